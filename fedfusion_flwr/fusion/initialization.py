# SPDX-License-Identifier: Apache-2.0
"""A hard first guess of who belongs together, from which the VAE starts.

Gradient ascent on the ELBO alone lands in poor optima: it merges true groups or splits one over
several components, and a split group changes the balanced mixture. A k-means partition, with the
number of groups chosen by the mean silhouette (Rousseeuw 1987), starts it in the right basin.
"""

from __future__ import annotations

import numpy as np
import torch
from sklearn.cluster import KMeans
from sklearn.metrics import silhouette_score
from torch import Tensor

MIN_SILHOUETTE = 0.1
"""Below this the clients count as one group: noise in many dimensions scores up to about 0.05."""

_SILHOUETTE_CLIENTS = 1000


def starting_partition(x: Tensor, max_groups: int) -> tuple[Tensor, float]:
    """Partition clients into the best-separated 1..max_groups groups.

    Parameters
    ----------
    x : Tensor
        Standardized statistics, shape (K, D).
    max_groups : int
        At least 1.

    Returns
    -------
    tuple[Tensor, float]
        Labels (K,), int64, the largest group first (stick breaking prefers that order), and the
        mean silhouette, in [-1, 1]; one group has `MIN_SILHOUETTE`.
    """
    points = x.double().numpy()
    best_labels = np.zeros(len(points), dtype=np.int64)
    best_quality = MIN_SILHOUETTE
    largest = min(max_groups, len(points) - 1)
    seeds = farthest_points(points, largest) if largest >= 2 else []
    for groups in range(2, largest + 1):
        labels = KMeans(groups, init=points[seeds[:groups]], n_init=1).fit(points).labels_
        quality = _silhouette(points, labels)
        if quality > best_quality:
            best_labels, best_quality = labels, quality
    sizes = np.bincount(best_labels)
    rank = np.argsort(np.argsort(-sizes, kind="stable"), kind="stable")
    return torch.as_tensor(rank[best_labels]), best_quality


def partition_quality(x: Tensor, labels: Tensor) -> float:
    """Mean silhouette of a partition; one group has `MIN_SILHOUETTE`."""
    if len(labels.unique()) < 2:
        return MIN_SILHOUETTE
    return _silhouette(x.double().numpy(), labels.numpy())


def farthest_points(points: np.ndarray, count: int) -> list[int]:
    """Indices of points chosen greedily, each the farthest from all chosen before (Gonzalez 1985).

    The first is the one farthest from the centroid; ties go to the lowest index.
    """
    chosen = [int(np.square(points - points.mean(0)).sum(1).argmax())]
    distance = np.square(points - points[chosen[0]]).sum(1)
    while len(chosen) < count:
        chosen.append(int(distance.argmax()))
        distance = np.minimum(distance, np.square(points - points[chosen[-1]]).sum(1))
    return chosen


def _silhouette(points: np.ndarray, labels: np.ndarray) -> float:
    if not 2 <= len(np.unique(labels)) <= len(labels) - 1:
        return MIN_SILHOUETTE
    if len(points) > _SILHOUETTE_CLIENTS:
        # Evenly spaced and not random: the same clients at every number of groups.
        pick = np.linspace(0, len(points) - 1, _SILHOUETTE_CLIENTS).astype(int)
        points, labels = points[pick], labels[pick]
        if not 2 <= len(np.unique(labels)) <= len(labels) - 1:
            return MIN_SILHOUETTE
    return float(silhouette_score(points, labels))
