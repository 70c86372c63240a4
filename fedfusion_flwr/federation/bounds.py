# SPDX-License-Identifier: Apache-2.0
"""Distances between models, and how far a model may move in one step.

Only parameters count: running statistics would dominate every distance.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fedfusion_flwr.fusion.state_dicts import BLOCK, State, is_parameter


def difference(state: Mapping[str, Tensor], reference: Mapping[str, Tensor]) -> State:
    """State - reference over the parameters, in float64."""
    return {
        key: value.double() - reference[key].double()
        for key, value in state.items()
        if is_parameter(key, value)
    }


def inner_product(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> float:
    """Inner product over the parameters, in float64."""
    return sum(
        float(torch.dot(value.double().flatten(), right[key].double().flatten()))
        for key, value in left.items()
        if is_parameter(key, value)
    )


def squared_distance(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> float:
    """||left - right||^2 over the parameters, in float64."""
    return sum(
        float((value.double() - right[key].double()).square().sum())
        for key, value in left.items()
        if is_parameter(key, value)
    )


class UpdateBound:
    """Finds models that must not replace the current one.

    Parameters
    ----------
    current : Mapping[str, Tensor]
        State dict.
    max_ratio : float
        Largest allowed ||proposed - current|| / ||current|| over the parameters.
    """

    def __init__(self, current: Mapping[str, Tensor], max_ratio: float) -> None:
        self.current = current
        self.max_ratio = max_ratio
        self._norm = _norm(current, square_sums(current))

    def objection(self, proposed: Mapping[str, Tensor]) -> str | None:
        """Why a model with the same keys must not replace the current one; None if it may."""
        sums = square_sums(proposed)
        odd = nonfinite(proposed, sums)
        return f"'{odd}' is not finite" if odd else self.leap(proposed, sums)

    def leap(self, proposed: Mapping[str, Tensor], sums: Mapping[str, float]) -> str | None:
        """The same for a finite model whose `square_sums` are known."""
        # ||proposed|| + ||current|| bounds the step, which is mostly enough; 1 % is for rounding.
        reach = 1.01 * (_norm(proposed, sums) + self._norm)
        if reach < self.max_ratio * self._norm:
            return None
        step = squared_distance(proposed, self.current)
        norm = inner_product(self.current, self.current)
        if norm > 0 and step > self.max_ratio**2 * norm:
            return f"the model moved {(step / norm) ** 0.5:.3g} times the model's norm"
        return None


def square_sums(state: Mapping[str, Tensor]) -> dict[str, float]:
    """Sum of squares of every floating-point tensor, in one pass; finite only if all values are.

    Computed in float32 or float64; an overflow counts as infinite.
    """
    return {
        key: sum(float(torch.dot(part, part)) for part in _pieces(value))
        for key, value in state.items()
        if value.is_floating_point()
    }


def nonfinite(state: Mapping[str, Tensor], sums: Mapping[str, float]) -> str | None:
    """Key of the first tensor that is not finite, if any, given the `square_sums`."""
    for key, total in sums.items():
        if not math.isfinite(total) and not bool(state[key].isfinite().all()):
            return key
    return None


def _norm(state: Mapping[str, Tensor], sums: Mapping[str, float]) -> float:
    return math.sqrt(sum(s for key, s in sums.items() if is_parameter(key, state[key])))


def _pieces(value: Tensor) -> Sequence[Tensor]:
    """Flat pieces: one long dot product in float32 would lose small values."""
    exact = value if value.dtype in (torch.float32, torch.float64) else value.float()
    return torch.split(exact.reshape(-1), BLOCK)
