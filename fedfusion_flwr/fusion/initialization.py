# SPDX-License-Identifier: Apache-2.0
"""Where the VAE starts: clear groups of clients, or the corners of their hull.

Gradient ascent on the ELBO alone ends in poor optima: it merges true groups or splits one over
several components. Where clients form groups it starts from them; where they are mixtures, from
archetypes (Cutler & Breiman 1994): corners of the clients' hull.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fedfusion_flwr.fusion.standardizer import some_clients

CLEAR_GROUPS = 0.5
"""From this mean silhouette on clients form groups ("reasonable structure", Kaufman & Rousseeuw
1990); below, they are taken for mixtures."""

NEARLY_BEST = 0.9
"""The largest number of groups is chosen whose silhouette is a local maximum, and at least this
share of the best.

The best itself is too coarse: if one group lies far off, "this one against the rest" scores
highest, even where the rest is several groups.
"""

_HULL_STEPS = 100
_HULL_TOLERANCE = 1e-6
_ROUNDS = 20


def clear_groups(x: Tensor, most: int, earlier: int = 0) -> Tensor | None:
    """Find well-separated groups of clients.

    Ward's linkage (1963), cut at the number of groups with the best mean silhouette (Rousseeuw
    1987), or a peak nearly as high. Of very many clients a sample is grouped, and the others join
    the nearest centre.

    Parameters
    ----------
    x : Tensor
        Clients, (K, P), float64.
    most : int
        Largest number of groups.
    earlier : int
        The number found before, which is kept unless another scores better.

    Returns
    -------
    Tensor or None
        Labels (K,), the largest group first, or None if no groups are clear.
    """
    # Imported here because clients import this package too, and scipy takes long.
    from scipy.cluster.hierarchy import cut_tree, linkage

    points = x[some_clients(len(x))].numpy()
    numbers = range(2, min(most, len(points) - 1) + 1)
    if not numbers:
        return None
    cuts = cut_tree(linkage(points, "ward"), list(numbers)).T
    distances = np.linalg.norm(points[:, None] - points, axis=2)
    scores = {n: silhouette(distances, cut) for n, cut in zip(numbers, cuts, strict=True)}
    best = max(scores.values(), default=0.0)
    if best < CLEAR_GROUPS:
        return None
    # Two groups may be one far off against all others, so three need not score better than two.
    below = {n: scores.get(n - 1, 0.0) if n > 3 else 0.0 for n in scores}
    peaks = (
        n
        for n, score in scores.items()
        if score >= max(NEARLY_BEST * best, below[n], scores.get(n + 1, 0.0))
    )
    chosen = max(peaks)
    if scores.get(earlier, 0.0) >= scores[chosen]:
        chosen = earlier
    labels = cuts[chosen - 2]
    if len(points) < len(x):
        centres = np.stack([points[labels == group].mean(0) for group in range(chosen)])
        labels = torch.cdist(x, torch.as_tensor(centres)).argmin(1).numpy()
    order = np.argsort(-np.bincount(labels, minlength=chosen), kind="stable")
    return torch.as_tensor(np.argsort(order)[labels])


def silhouette(distances: np.ndarray, labels: np.ndarray) -> float:
    """Mean over clients of (b - a) / max(a, b), Rousseeuw 1987, eq. 3; 0 for a client alone.

    a is the mean distance from the others of the client's own group, b that from the nearest other
    group. Distances (K, K), labels (K,) from 0 to G - 1, G at least 2.
    """
    member = np.eye(labels.max() + 1)[labels]
    sizes = member.sum(0)
    own = sizes[labels]
    total = distances @ member
    inside = (total * member).sum(1) / np.maximum(own - 1, 1)
    outside = np.where(member > 0, np.inf, total / sizes).min(1)
    value = (outside - inside) / np.maximum(np.maximum(inside, outside), 1e-300)
    return float(np.where(own > 1, value, 0.0).mean())


def archetypes(x: Tensor, count: int) -> Tensor:
    """Memberships (K, M') of clients x (K, P) in ``count`` corners of their hull.

    Starts from the clients that successive projection finds (Araujo et al. 2001), then alternates
    between memberships and corners, which stay convex combinations of clients. Fewer corners where
    the clients do not span as many. Of very many clients a sample decides on the corners.
    """
    points = x[some_clients(len(x))]
    corners = points[_extremes(points, count)]
    for _ in range(_ROUNDS):
        b = hull_memberships(points, corners)
        wanted = torch.linalg.lstsq(b, points, driver="gelsd").solution
        moved = hull_memberships(wanted, points) @ points
        done = bool((moved - corners).abs().max() < 1e-3 * points.abs().max())
        corners = moved
        if done:
            break
    return hull_memberships(x, corners)


def hull_memberships(x: Tensor, corners: Tensor) -> Tensor:
    """The b (K, M) on the simplex that minimize the distance of ``b @ corners`` from x (K, P).

    Accelerated projected gradient (Beck & Teboulle 2009).
    """
    step = 1 / torch.linalg.matrix_norm(corners, 2).square().clamp_min(1e-12)
    b = ahead = x.new_full((len(x), len(corners)), 1 / len(corners))
    momentum = 1.0
    for _ in range(_HULL_STEPS):
        moved = project_to_simplex(ahead - step * ((ahead @ corners - x) @ corners.T))
        following = (1 + (1 + 4 * momentum**2) ** 0.5) / 2
        ahead = moved + (momentum - 1) / following * (moved - b)
        done = bool((moved - b).abs().max() < _HULL_TOLERANCE)
        b, momentum = moved, following
        if done:
            break
    return b


def project_to_simplex(rows: Tensor) -> Tensor:
    """The nearest point of the simplex for every row (Duchi et al. 2008, fig. 1)."""
    ordered = rows.sort(1, descending=True).values
    excess = ordered.cumsum(1) - 1
    rank = torch.arange(1, rows.shape[1] + 1, dtype=rows.dtype)
    support = (ordered * rank > excess).sum(1, keepdim=True)
    return (rows - excess.gather(1, support - 1) / support).clamp_min(0)


def _extremes(x: Tensor, count: int) -> list[int]:
    """Clients far out in directions not yet taken; at most ``count``."""
    chosen = [int((x - x.mean(0)).square().sum(1).argmax())]
    rest = x - x[chosen[0]]
    while len(chosen) < count:
        length = rest.square().sum(1)
        furthest = int(length.argmax())
        if length[furthest] <= 1e-12 * x.square().sum(1).max():
            break
        chosen.append(furthest)
        direction = rest[furthest] / length[furthest].sqrt()
        rest = rest - torch.outer(rest @ direction, direction)
    return chosen


def agreement(first: Tensor, second: Tensor) -> float:
    """Adjusted Rand index of two partitions (K,): 1 for equal up to names, 0 for chance."""
    from sklearn.metrics import adjusted_rand_score

    return float(adjusted_rand_score(first.numpy(), second.numpy()))
