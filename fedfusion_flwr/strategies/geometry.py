# SPDX-License-Identifier: Apache-2.0
"""Coordinates and clusterings of model updates; only parameters count."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedfusion_flwr.config import Linkage
from fedfusion_flwr.federation.bounds import squared_distance
from fedfusion_flwr.fusion.state_dicts import is_parameter
from fedfusion_flwr.randomness import numpy_generator

_CHUNK = 1 << 16
_ROUNDING = 1e-6
"""Rounding error of float64 sums over many parameters, relative to the length of an update."""


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


def nearest(state: Mapping[str, Tensor], models: Sequence[Mapping[str, Tensor]]) -> int:
    """Which model is the nearest by its parameters; ties go to the first."""
    distances = [squared_distance(state, model) for model in models]
    return distances.index(min(distances))


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


def decomposed_cosines(gram: Tensor, dimensions: int) -> Tensor:
    """E, (K, dimensions): cosine of every update with the leading singular directions.

    With eigenpairs (lambda_k, u_k) of the updates' Gram matrix G, E_ik = sqrt(lambda_k) u_ik /
    sqrt(G_ii): the singular vectors themselves are never needed. Signs of columns are arbitrary.
    """
    return principal_coordinates(gram, dimensions) / gram.diagonal().sqrt().unsqueeze(1)


def count_different(points: Tensor) -> int:
    """How many rows of (K, D) differ by more than rounding: no clustering can find more groups."""
    scale = float(points.abs().max()) or 1.0
    return len(torch.unique((points / (_ROUNDING * scale)).round(), dim=0))


def k_means(points: Tensor, num_clusters: int, seed: int) -> list[int]:
    """Cluster numbers (K,) of points (K, D) by k-means++ with ten restarts.

    Numbered in the order in which clusters first appear; fewer clusters where there are fewer
    different points.
    """
    # Imported here: it takes about a second, in every process of a simulation.
    from sklearn.cluster import KMeans

    random_state = int(numpy_generator(seed, "k-means").integers(2**31))
    means = KMeans(min(num_clusters, count_different(points)), n_init=10, random_state=random_state)
    return _in_order(means.fit_predict(points.numpy()))


def agglomerate(
    points: Tensor, num_clusters: int, distance_threshold: float, linkage: Linkage
) -> list[int]:
    """Cluster numbers (K,) of points (K, D), in the order in which the clusters first appear.

    ``distance_threshold`` 0 cuts the tree at ``num_clusters``, or at the number of different points
    where that is less.
    """
    if len(points) == 1:
        return [0]
    # Imported here: it takes about a second, in every process of a simulation.
    from sklearn.cluster import AgglomerativeClustering

    cut: dict[str, Any] = {"n_clusters": min(num_clusters, count_different(points))}
    if distance_threshold:
        cut = {"n_clusters": None, "distance_threshold": distance_threshold}
    found = AgglomerativeClustering(linkage=linkage, **cut).fit_predict(points.numpy())
    return _in_order(found)


def _in_order(labels: np.ndarray) -> list[int]:
    """The same clusters, numbered 0, 1, ... as they first appear, not as a library chose."""
    order: dict[int, int] = {}
    return [order.setdefault(label, len(order)) for label in labels.tolist()]
