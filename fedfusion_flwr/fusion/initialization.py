# SPDX-License-Identifier: Apache-2.0
"""The hard partition of the clients from which the VAE starts.

Gradient ascent on the ELBO alone ends in poor optima: it merges true groups or splits one over
several components, which changes the balanced mixture. A k-means partition, with the number of
groups chosen by the mean silhouette (Rousseeuw 1987), starts it in the right basin.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fedfusion_flwr.fusion.standardizer import some_clients

MIN_SILHOUETTE = 0.1
"""Below this all clients are one group: noise in many dimensions scores up to about 0.05."""

PARSIMONY = 0.9
"""The largest number of groups whose silhouette reaches this share of the best is chosen.

The best itself is too coarse: if one group lies far off, "this one against the rest" scores
highest, even where the rest is several groups.
"""

_RESTARTS = 10
_FEW_CLIENTS = 100
"""With more, k-means hardly depends on its start, and a restart costs more."""


def starting_partition(x: Tensor, max_groups: int) -> Tensor:
    """Partition clients into well-separated groups, at most ``max_groups``.

    Parameters
    ----------
    x : Tensor
        Standardized statistics, shape (K, D).
    max_groups : int
        At least 1.

    Returns
    -------
    Tensor
        Labels (K,), int64, the largest group first: stick breaking prefers that order.
    """
    # Imported here because clients import this package too, and sklearn takes a second.
    from sklearn.cluster import KMeans
    from sklearn.metrics import pairwise_distances

    # Of very many clients a sample is partitioned; the others join the nearest group.
    points = x[some_clients(len(x))].double().numpy()
    restarts = _RESTARTS if len(points) <= _FEW_CLIENTS else 2
    distances = pairwise_distances(points)
    largest = min(max_groups, len(points) - 1, len(np.unique(points, axis=0)))
    candidates: list[tuple[float, KMeans]] = []
    for groups in range(2, largest + 1):
        found = KMeans(groups, n_init=restarts, random_state=0).fit(points)
        candidates.append((_silhouette(distances, found.labels_), found))
    best = max((quality for quality, _ in candidates), default=0.0)
    chosen = np.zeros(len(x), dtype=np.int64)
    if best > MIN_SILHOUETTE:
        winner = [found for quality, found in candidates if quality >= PARSIMONY * best][-1]
        everybody = len(points) == len(x)
        chosen = winner.labels_ if everybody else winner.predict(x.double().numpy())
    sizes = np.bincount(chosen)
    rank = np.argsort(np.argsort(-sizes, kind="stable"), kind="stable")
    return torch.as_tensor(rank[chosen])


def agreement(first: Tensor, second: Tensor) -> float:
    """Adjusted Rand index of two partitions (K,): 1 for equal up to names, 0 for chance."""
    from sklearn.metrics import adjusted_rand_score

    return float(adjusted_rand_score(first.numpy(), second.numpy()))


def _silhouette(distances: np.ndarray, labels: np.ndarray) -> float:
    if not 2 <= len(np.unique(labels)) <= len(labels) - 1:
        return 0.0
    from sklearn.metrics import silhouette_score

    return float(silhouette_score(distances, labels, metric="precomputed"))
