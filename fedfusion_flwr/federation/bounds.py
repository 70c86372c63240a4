# SPDX-License-Identifier: Apache-2.0
"""Geometry of model updates: differences, bounds, and coordinates for clustering.

Only parameters count: running statistics would dominate every distance.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fedfusion_flwr.fusion.state_dicts import BLOCK, State, is_parameter

_CHUNK = 1 << 16
_ROUNDING = 1e-6
"""What of an update's length float64 sums over many parameters may leave behind."""


def difference(state: Mapping[str, Tensor], reference: Mapping[str, Tensor]) -> State:
    """State - reference over the parameters, in float64."""
    return {
        key: value.double() - reference[key].double()
        for key, value in state.items()
        if is_parameter(key, value)
    }


def inner_product(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> float:
    """Sum of the products of all parameters, in float64."""
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


def gram_matrix(states: Sequence[Mapping[str, Tensor]], origin: Mapping[str, Tensor]) -> Tensor:
    """Inner products of the updates ``states[i] - origin``, (K, K), float64.

    Streamed over pieces of the parameters: memory is K times a piece, not K times a model.
    """
    gram = torch.zeros(len(states), len(states), dtype=torch.float64)
    for key, value in origin.items():
        if not is_parameter(key, value):
            continue
        base = value.flatten()
        rows = [state[key].flatten() for state in states]
        for start in range(0, base.numel(), _CHUNK):
            piece = slice(start, start + _CHUNK)
            block = torch.stack([row[piece].double() for row in rows]) - base[piece].double()
            gram += block @ block.T
    return gram


def principal_coordinates(gram: Tensor, dimensions: int | None = None) -> Tensor:
    """Points whose inner products are ``gram``, (K, dimensions), largest directions first.

    With all dimensions (the default, K) the distances of the points are those of the updates:
    row i is sqrt(lambda_k) u_ik over the eigenpairs (lambda_k, u_k) of the Gram matrix. Directions
    shorter than a millionth of the longest are rounding and become 0.
    """
    values, vectors = torch.linalg.eigh(gram)
    values, vectors = values.flip(0), vectors.flip(1)
    values = torch.where(values > _ROUNDING**2 * values[0], values, 0.0)
    points: Tensor = vectors * values.sqrt()
    return points[:, :dimensions]


def count_different(points: Tensor) -> int:
    """How many rows of (K, D) differ by more than rounding: no clustering can find more groups."""
    scale = float(points.abs().max()) or 1.0
    return len(torch.unique((points / (_ROUNDING * scale)).round(), dim=0))


class UpdateBound:
    """Tells models that must not replace the current one.

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
        """Why a model must not replace the current one, of the same keys; None if it may."""
        sums = square_sums(proposed)
        odd = nonfinite(proposed, sums)
        return f"'{odd}' is not finite" if odd else self.leap(proposed, sums)

    def leap(self, proposed: Mapping[str, Tensor], sums: Mapping[str, float]) -> str | None:
        """The same for a finite model whose `square_sums` are known."""
        # ||proposed|| + ||current|| bounds the step and mostly settles it; 1 % is for rounding.
        reach = 1.01 * (_norm(proposed, sums) + self._norm)
        if reach < self.max_ratio * self._norm:
            return None
        step = squared_distance(proposed, self.current)
        norm = inner_product(self.current, self.current)
        if norm > 0 and step > self.max_ratio**2 * norm:
            return f"the model moved {(step / norm) ** 0.5:.3g} times the model's norm"
        return None


def square_sums(state: Mapping[str, Tensor]) -> dict[str, float]:
    """Sum of squares of every floating tensor, in one reading; finite only if all values are.

    To the precision of float32, whose overflow counts as infinite.
    """
    return {
        key: sum(float(torch.dot(part, part)) for part in _pieces(value))
        for key, value in state.items()
        if value.is_floating_point()
    }


def nonfinite(state: Mapping[str, Tensor], sums: Mapping[str, float]) -> str | None:
    """The first key of a tensor that is not finite, if any, given the `square_sums`."""
    for key, total in sums.items():
        if not math.isfinite(total) and not bool(state[key].isfinite().all()):
            return key
    return None


def _norm(state: Mapping[str, Tensor], sums: Mapping[str, float]) -> float:
    return math.sqrt(sum(s for key, s in sums.items() if is_parameter(key, state[key])))


def _pieces(value: Tensor) -> Sequence[Tensor]:
    """Flat ones: a long dot product in float32 would lose what is small."""
    exact = value if value.dtype in (torch.float32, torch.float64) else value.float()
    return torch.split(exact.reshape(-1), BLOCK)
