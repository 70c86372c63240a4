# SPDX-License-Identifier: Apache-2.0
"""Geometry of model updates: differences, inner products and coordinates for clustering.

Only parameters count: running statistics would dominate every distance.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fedfusion_flwr.fusion.state_dicts import is_parameter

State = dict[str, Tensor]
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
