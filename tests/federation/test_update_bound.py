# SPDX-License-Identifier: Apache-2.0
"""Models that are not finite, or moved too far, are refused."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedfusion_flwr.federation.bounds import UpdateBound, nonfinite, square_sums
from fedfusion_flwr.fusion.state_dicts import BLOCK


@pytest.mark.parametrize(
    ("old", "new", "ratio", "objection"),
    [
        # (3, 4) to (3, 16) moved 12 from a norm of 5.
        ([3.0, 4.0], [3.0, 16.0], 2.41, None),
        ([3.0, 4.0], [3.0, 16.0], 2.39, "the model moved 2.4 times the model's norm"),
        # Along itself: 1 to 12 moved by 11 of a norm of 1; to 10.9 it is 9.9.
        ([1.0], [10.9], 10.0, None),
        ([1.0], [12.0], 10.0, "the model moved 11 times the model's norm"),
    ],
)
def test_a_model_that_moved_too_far_is_implausible(
    old: list[float], new: list[float], ratio: float, objection: str | None
) -> None:
    """Only parameters count, not statistics."""
    before = {"w": torch.tensor(old), "running_mean": torch.zeros(1)}
    after = {"w": torch.tensor(new), "running_mean": torch.full((1,), 50.0)}
    assert UpdateBound(before, ratio).objection(after) == objection


@pytest.mark.parametrize("key", ["w", "running_mean"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_model_that_is_not_finite_is_implausible(key: str, value: float) -> None:
    old = {"w": torch.ones(2), "running_mean": torch.ones(2)}
    reason = UpdateBound(old, 10.0).objection({**old, key: torch.tensor([1.0, value])})
    assert f"'{key}' is not finite" in str(reason)


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
