# SPDX-License-Identifier: Apache-2.0
"""Fusion of state dicts, small ones and ones that are larger than a block."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedfusion_flwr.fusion import fuse_state_dicts
from fedfusion_flwr.fusion.state_dicts import BLOCK, is_parameter
from fedfusion_flwr.models import build_model
from tests.fusion.tensors import State, f64, generator, layer, many, values

SIZES = (1, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK + 7)


@pytest.mark.parametrize("size", SIZES)
def test_blocks_do_not_show_in_the_sum(size: int) -> None:
    noise = generator(size)
    vectors = [torch.randn(size, generator=noise) for _ in range(3)]
    fused = fuse_state_dicts([{"w": vector} for vector in vectors], f64(0.5, 0.3, 0.2))["w"]
    expected = sum(w * v.double() for w, v in zip((0.5, 0.3, 0.2), vectors, strict=True))
    torch.testing.assert_close(fused.double(), expected, rtol=1e-6, atol=1e-9)


def test_bits_do_not_depend_on_the_number_of_threads() -> None:
    """Blocks are large enough for torch to share each among threads."""
    noise = generator()
    states = [{"w": torch.randn(2_000_003, generator=noise)} for _ in range(20)]
    weights = torch.softmax(torch.randn(20, generator=noise).double(), 0)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(fuse_state_dicts(states, weights)["w"])
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_a_transposed_parameter_is_fused_where_it_belongs() -> None:
    first, second = torch.arange(6.0).reshape(2, 3), torch.arange(6.0).reshape(3, 2).T
    fused = fuse_state_dicts([{"w": first}, {"w": second}], torch.tensor([0.5, 0.5]))["w"]
    assert torch.equal(fused, (first + second) / 2)


@pytest.mark.parametrize(("pool_moments", "variance"), [(True, 13.0), (False, 1.0)])
def test_fusion_by_hand(pool_moments: bool, variance: float) -> None:
    """p = (1/4, 3/4): weight (4 + 3 * 8) / 4 = 7; mean (-6 + 3 * 2) / 4 = 0.

    Pooled variance (1 + 36) / 4 + 3 (1 + 4) / 4 - 0 = 13; the average of the variances is 1.
    """
    states = [layer(4.0, -6.0, 1.0, 7), layer(8.0, 2.0, 1.0, 3)]
    fused = fuse_state_dicts(states, f64(0.25, 0.75), pool_moments=pool_moments)
    assert values(fused) == values(layer(7.0, 0.0, variance, 7))


finite = st.floats(-100, 100, width=32)


@many
@given(
    st.lists(
        st.tuples(finite, finite, st.floats(0, 100, width=32), st.integers(1, 1000)),
        min_size=1,
        max_size=6,
    )
)
def test_fusion_agrees_with_an_independent_reference(
    clients: list[tuple[float, float, float, int]],
) -> None:
    """The reference builds E[x^2] - E[x]^2 in numpy; the fused mean stays in the clients' hull."""
    weight, mean, variance, n = (np.array(c, np.float64) for c in zip(*clients, strict=True))
    p = n / n.sum()
    states = [layer(w, m, v, int(k)) for w, m, v, k in clients]
    fused = values(fuse_state_dicts(states, torch.as_tensor(p)))
    assert fused["0.weight"] == pytest.approx(np.sum(p * weight), rel=1e-6, abs=1e-5)
    assert fused["1.running_mean"] == pytest.approx(np.sum(p * mean), rel=1e-6, abs=1e-5)
    second_moment = np.sum(p * (variance + mean**2))
    expected = second_moment - np.sum(p * mean) ** 2
    assert fused["1.running_var"] == pytest.approx(expected, rel=1e-5, abs=1e-5)
    assert fused["1.num_batches_tracked"] == max(n)
    assert mean.min() - 1e-4 <= fused["1.running_mean"] <= mean.max() + 1e-4
    assert fused["1.running_var"] >= np.sum(p * variance) * (1 - 1e-5) - 1e-5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_every_floating_type_comes_back_as_it_went_in(dtype: torch.dtype) -> None:
    states = [{"w": torch.tensor([v], dtype=dtype)} for v in (1.0, 2.0)]
    fused = fuse_state_dicts(states, f64(0.5, 0.5))["w"]
    assert fused.dtype == dtype
    assert fused.item() == 1.5


def test_integer_buffers_take_the_maximum_exactly() -> None:
    """2^53 + 1 is not a float64."""
    states = [{"n": torch.tensor(2**53 + 1)}, {"n": torch.tensor(5)}]
    fused = fuse_state_dicts(states, f64(0.1, 0.9))["n"]
    assert fused.dtype == torch.int64
    assert fused.item() == 2**53 + 1


def test_sums_are_kept_in_double_precision() -> None:
    """1e8 + 1 - 1e8 = 1 for weights 1/3 each is 1/3; float32 sums would lose the 1."""
    states = [{"w": torch.tensor([v])} for v in (1e8, 1.0, -1e8)]
    fused = fuse_state_dicts(states, torch.full((3,), 1 / 3, dtype=torch.float64))
    assert fused["w"].item() == pytest.approx(1 / 3, rel=1e-6)


def test_half_precision_sums_do_not_overflow() -> None:
    """The sum of ten 60000s is beyond float16, their mean is not; nor is their second moment."""
    state = {
        "running_mean": torch.full((1,), 300.0, dtype=torch.float16),
        "running_var": torch.full((1,), 60000.0, dtype=torch.float16),
    }
    fused = fuse_state_dicts([state] * 10, torch.full((10,), 0.1))
    assert (fused["running_mean"].item(), fused["running_var"].item()) == (300.0, 60000.0)


def test_fusing_one_client_gives_its_model() -> None:
    state = build_model("lenet", (1, 8, 8), 3, seed=0).state_dict()
    state["features.1.running_mean"] = torch.randn(16)
    fused = fuse_state_dicts([state], torch.ones(1))
    assert list(fused) == list(state)
    assert all(torch.equal(fused[key], state[key]) for key in state)


def test_states_may_come_from_a_generator_that_is_consumed_once() -> None:
    taken = []

    def stream() -> Iterator[State]:
        for value in (1.0, 3.0):
            taken.append(value)
            yield {"w": torch.tensor([value])}

    assert fuse_state_dicts(stream(), f64(0.5, 0.5))["w"].item() == 2.0
    assert taken == [1.0, 3.0]


def test_fusion_neither_changes_nor_shares_its_inputs() -> None:
    states = [layer(4.0, -6.0, 1.0, 7), layer(8.0, 2.0, 1.0, 3)]
    before = [values(state) for state in states]
    for value in fuse_state_dicts(states, f64(1, 0)).values():
        value.fill_(99)
    assert [values(state) for state in states] == before


@pytest.mark.parametrize(
    ("states", "weights", "message"),
    [
        ([{"a": torch.ones(1)}, {"b": torch.ones(1)}], (0.5, 0.5), r"keys: \['a', 'b'\]"),
        ([{"a": torch.ones(1)}, {"a": torch.ones(2)}], (0.5, 0.5), r"a: shape \(2,\) differs"),
        ([{"a": torch.ones(1)}], (0.5, 0.5), "1 states for 2 weights"),
        ([{"a": torch.ones(1)}] * 2, (1.0,), "more states than the 1 weights"),
        ([], (), "0 states for 0 weights"),
    ],
)
def test_states_that_do_not_fit_are_refused(
    states: list[State], weights: tuple[float, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        fuse_state_dicts(states, f64(*weights))


def test_parameters_are_distinguished_from_buffers() -> None:
    model = build_model("lenet", (1, 8, 8), 3, seed=0)
    names = {key for key, value in model.state_dict().items() if is_parameter(key, value)}
    assert names == {name for name, _ in model.named_parameters()}
