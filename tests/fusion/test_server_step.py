# SPDX-License-Identifier: Apache-2.0
"""From client models to the next global model: fusion, server step and serving."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedfusion_flwr.federation.bounds import UpdateBound
from fedfusion_flwr.fusion import ServedAverage, ServerStep, fuse_state_dicts
from fedfusion_flwr.fusion.state_dicts import is_parameter
from fedfusion_flwr.models import build_model

many = settings(deadline=None, max_examples=60)
State = dict[str, Tensor]


def f64(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def layer(weight: float, mean: float, variance: float, batches: int = 0) -> State:
    return {
        "0.weight": torch.tensor([weight]),
        "1.running_mean": torch.tensor([mean]),
        "1.running_var": torch.tensor([variance]),
        "1.num_batches_tracked": torch.tensor(batches),
    }


def values(state: State) -> dict[str, object]:
    return {key: value.squeeze().item() for key, value in state.items()}


def copied(state: State) -> State:
    return {key: value.clone() for key, value in state.items()}


# --- fuse_state_dicts -----------------------------------------------------------------------------


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
    before = [copied(state) for state in states]
    for value in fuse_state_dicts(states, f64(1, 0)).values():
        value.fill_(99)
    assert [values(state) for state in states] == [values(state) for state in before]


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


# --- ServerStep -----------------------------------------------------------------------------------


def test_rate_one_without_momentum_returns_the_aggregate_bit_for_bit() -> None:
    """.1 + (.3 - .1) is not .3 in floating point: the step must not compute it."""
    step = ServerStep()
    for _ in range(2):
        stepped = step(layer(0.1, 0.1, 0.1), layer(0.3, 0.3, 0.3, 4))
        assert values(stepped) == values(layer(0.3, 0.3, 0.3, 4))
    assert step.is_identity
    assert not step.velocity


def test_momentum_over_three_rounds_by_hand() -> None:
    """Rate 1/2, momentum 1/2, aggregates 4, 4, 0 from w = 0.

    v = 4, w = 2; v = (4 - 2) + 4/2 = 4, w = 4; v = (0 - 4) + 4/2 = -2, w = 3.
    """
    step = ServerStep(learning_rate=0.5, momentum=0.5)
    model, path = layer(0.0, 0.0, 1.0), []
    for aggregate in (4.0, 4.0, 0.0):
        model = step(model, layer(aggregate, aggregate, 1.0))
        path.append(model["0.weight"].item())
    assert path == [2.0, 4.0, 3.0]


def test_statistics_and_counters_are_replaced_not_stepped() -> None:
    stepped = ServerStep(0.5, 0.9)(layer(0.0, 0.0, 1.0, 3), layer(2.0, 8.0, 5.0, 9))
    assert values(stepped) == values(layer(1.0, 8.0, 5.0, 9))


def test_step_leaves_both_models_alone_and_keeps_the_type() -> None:
    current, aggregate = layer(0.0, 0.0, 1.0), layer(2.0, 8.0, 5.0)
    step = ServerStep(0.5, 0.9)
    for _ in range(2):
        stepped = step(current, aggregate)
        assert stepped["0.weight"].dtype == torch.float32
    assert values(current) == values(layer(0.0, 0.0, 1.0))
    assert values(aggregate) == values(layer(2.0, 8.0, 5.0))


def test_parameters_are_told_from_buffers() -> None:
    state = {**build_model("lenet", (1, 8, 8), 3, seed=0).state_dict()}
    names = {key for key, value in state.items() if is_parameter(key, value)}
    model = build_model("lenet", (1, 8, 8), 3, seed=0)
    assert names == {name for name, _ in model.named_parameters()}


def test_a_model_that_moved_too_far_is_implausible() -> None:
    """Weights (3, 4) to (3, 16) moved 12 from a norm of 5: 2.4 times; statistics do not count."""
    old = {"w": torch.tensor([3.0, 4.0]), "running_mean": torch.zeros(1)}
    new = {"w": torch.tensor([3.0, 16.0]), "running_mean": torch.full((1,), 50.0)}
    assert UpdateBound(old, 2.41).objection(new) is None
    assert "moved 2.4 times" in str(UpdateBound(old, 2.39).objection(new))


@pytest.mark.parametrize("key", ["w", "running_mean"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_model_that_is_not_finite_is_implausible(key: str, value: float) -> None:
    old = {"w": torch.ones(2), "running_mean": torch.ones(2)}
    reason = UpdateBound(old, 10.0).objection({**old, key: torch.tensor([1.0, value])})
    assert f"'{key}' is not finite" in str(reason)


# --- ServedAverage --------------------------------------------------------------------------------


def test_average_of_two_models_weighs_them_one_to_two() -> None:
    """d = 1/2: weights d (1 - d) / (1 - d^2) = 1/3 and 2/3; 3 and 9 give 7.

    Means 0 and 3 with variances 1 and 4: mean 2; E[x^2] = (1 + 0) / 3 + 2 (4 + 9) / 3 = 9; var 5.
    """
    average = ServedAverage(0.5)
    assert values(average.update(layer(3.0, 0.0, 1.0, 5))) == values(layer(3.0, 0.0, 1.0, 5))
    served = values(average.update(layer(9.0, 3.0, 4.0, 6)))
    assert served == pytest.approx(values(layer(7.0, 2.0, 5.0, 6)))


def test_average_follows_its_weights_over_many_models() -> None:
    """After t models, model i counts d^(t-i) (1 - d) / (1 - d^t)."""
    decay, models = 0.8, [1.0, -2.0, 5.0, 0.0, 7.0]
    average = ServedAverage(decay)
    for value in models:
        served = average.update({"w": f64(value)})
    t = len(models)
    shares = [decay ** (t - i) * (1 - decay) / (1 - decay**t) for i in range(1, t + 1)]
    assert sum(shares) == pytest.approx(1)
    assert served["w"].item() == pytest.approx(np.dot(shares, models), rel=1e-12)


def test_no_decay_serves_the_newest_model() -> None:
    average = ServedAverage()
    for value in (3.0, 0.1):
        served = average.update(layer(value, value, 1.0))
        assert values(served) == values(layer(value, value, 1.0))


def test_updating_the_average_leaves_the_models_alone() -> None:
    average, models = ServedAverage(0.5), [layer(3.0, 0.0, 1.0), layer(9.0, 3.0, 4.0)]
    for model in models:
        average.update(model)
    assert [values(m) for m in models] == [values(layer(3.0, 0.0, 1.0)), values(layer(9, 3, 4))]
