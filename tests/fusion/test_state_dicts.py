# SPDX-License-Identifier: Apache-2.0
"""Arithmetic of models that are larger than a block; the small ones are in test_server_step.py."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedfusion_flwr.federation.bounds import UpdateBound, nonfinite, square_sums
from fedfusion_flwr.fusion import fuse_state_dicts
from fedfusion_flwr.fusion.state_dicts import BLOCK

SIZES = (1, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK + 7)


@pytest.mark.parametrize("size", SIZES)
def test_blocks_do_not_show_in_the_sum(size: int) -> None:
    generator = torch.Generator().manual_seed(size)
    values = [torch.randn(size, generator=generator) for _ in range(3)]
    weights = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    fused = fuse_state_dicts([{"w": value} for value in values], weights)["w"]
    expected = sum(w * v.double().numpy() for w, v in zip(weights.tolist(), values, strict=True))
    np.testing.assert_allclose(fused.numpy(), expected, rtol=1e-6, atol=1e-9)


def test_bits_do_not_depend_on_the_number_of_threads() -> None:
    """Blocks are large enough for torch to share each among threads."""
    generator = torch.Generator().manual_seed(0)
    states = [{"w": torch.randn(2_000_003, generator=generator)} for _ in range(20)]
    weights = torch.softmax(torch.randn(20, generator=generator).double(), 0)
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


@pytest.mark.parametrize("place", [0, BLOCK - 1, BLOCK, 2 * BLOCK])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_one_bad_value_is_found_wherever_it_is(place: int, value: float) -> None:
    state = {"a": torch.ones(3), "w": torch.zeros(2 * BLOCK + 1), "n": torch.tensor(1)}
    assert nonfinite(state, square_sums(state)) is None
    state["w"][place] = value
    assert nonfinite(state, square_sums(state)) == "w"


def test_values_whose_squares_overflow_are_finite() -> None:
    state = {"w": torch.full((4,), 1e30)}
    assert square_sums(state) == {"w": math.inf}
    assert nonfinite(state, square_sums(state)) is None
    assert "moved 1e+30 times" in str(UpdateBound({"w": torch.ones(4)}, 10.0).objection(state))


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.floats(-1e3, 1e3, width=32), min_size=2, max_size=2),
    st.lists(st.floats(-1e3, 1e3, width=32), min_size=2, max_size=2),
    st.floats(0.01, 100),
)
def test_bound_agrees_with_its_definition(
    current: list[float], proposed: list[float], ratio: float
) -> None:
    norm, step = math.hypot(*current), math.dist(current, proposed)
    objection = UpdateBound({"w": torch.tensor(current)}, ratio).objection(
        {"w": torch.tensor(proposed)}
    )
    if abs(step - ratio * norm) > 1e-6 * (step + ratio * norm):
        assert (objection is not None) == (norm > 0 and step > ratio * norm)


def test_a_model_with_a_large_bound_still_may_not_leap() -> None:
    """|w| = 1 to 12 along itself moves by 11 of a norm of 1, more than 10; to 10.9 it is 9.9."""
    bound = UpdateBound({"w": torch.tensor([1.0])}, 10.0)
    assert bound.objection({"w": torch.tensor([10.9])}) is None
    assert "moved 11 times" in str(bound.objection({"w": torch.tensor([12.0])}))
