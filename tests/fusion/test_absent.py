# SPDX-License-Identifier: Apache-2.0
"""Remembered steps of components that sit a round out."""

from __future__ import annotations

import pytest
import torch

from fedfusion_flwr.fusion.absent import AbsentComponents
from tests.fusion.tensors import State, f64, values


def model(weight: float, mean: float, batches: int = 0) -> State:
    return {
        "w": torch.tensor([weight]),
        "n.running_mean": torch.tensor([mean]),
        "n.num_batches_tracked": torch.tensor(batches),
    }


def after_one_round() -> AbsentComponents:
    """From w = 10: clients 0 and 1 in component 0, client 2 in component 1; 10, 30, 5 examples."""
    absent = AbsentComponents()
    states = [model(12.0, 1.0, 4), model(16.0, 5.0, 6), model(9.0, -3.0, 5)]
    b = f64([1, 0, 0], [1, 0, 0], [0, 1, 0])
    absent.remember(states, b, f64(10, 30, 5), model(10.0, 2.0))
    return absent


def test_a_component_remembers_its_step_and_its_statistics() -> None:
    """Component 0: (12 + 3 * 16) / 4 - 10 = 5, mean (1 + 3 * 5) / 4 = 4. Component 1: 9 - 10.

    The batch counter is the whole cohort's maximum in both.
    """
    last = after_one_round().last
    assert values(last[0]) == values(model(5.0, 4.0, 6))
    assert values(last[1]) == values(model(-1.0, -3.0, 6))
    assert set(last) == {0, 1}


def test_an_absent_component_repeats_its_step_from_the_current_model() -> None:
    """Round 2 starts from w = 100 with component 1 only: component 0 would have sent 105."""
    ghosts, weights = after_one_round().recall(
        f64([0, 1, 0]), f64(0.5, 0.25, 0.25), model(100.0, 7.0)
    )
    assert [values(ghost) for ghost in ghosts] == [values(model(105.0, 4.0, 6))]
    assert weights == [0.5]


@pytest.mark.parametrize(
    ("present", "mixture", "steps", "weights"),
    [
        # the first two are present, and the third never was
        ([0.5, 0.5, 0], (0.2, 0.2, 0.6), [], []),
        # no place in the mixture
        ([0, 1, 0], (0, 1, 0), [], []),
        # two, in the order of the components
        ([0, 0, 1], (0.3, 0.2, 0.5), [5.0, -1.0], [0.3, 0.2]),
    ],
)
def test_only_absent_components_with_a_place_in_the_mixture_have_ghosts(
    present: list[float], mixture: tuple[float, ...], steps: list[float], weights: list[float]
) -> None:
    ghosts, found = after_one_round().recall(f64(present), f64(*mixture), model(0.0, 0.0))
    assert [values(ghost)["w"] for ghost in ghosts] == steps
    assert found == weights


def test_a_trace_counts_as_absent() -> None:
    """A ten-thousandth of a client neither silences a component's ghost nor renews its step."""
    absent, b = after_one_round(), f64([1e-4, 1 - 1e-4, 0])
    current = model(100.0, 7.0)
    ghosts, weights = absent.recall(b, f64(0.5, 0.5, 0), current)
    assert [values(ghost)["w"] for ghost in ghosts] == [105.0]
    assert weights == [0.5]
    absent.remember([model(300.0, 0.0)], b, f64(8), current)
    assert values(absent.last[0])["w"] == 5.0
    assert values(absent.last[1])["w"] == 200.0


def test_neither_the_models_nor_the_memory_change_by_recalling() -> None:
    absent, current = after_one_round(), model(100.0, 7.0)
    arguments = (f64([0, 1, 0]), f64(0.5, 0.5, 0), current)
    first = [values(ghost) for ghost in absent.recall(*arguments)[0]]
    second = [values(ghost) for ghost in absent.recall(*arguments)[0]]
    assert first == second
    assert values(current) == values(model(100.0, 7.0))
