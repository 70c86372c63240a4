# SPDX-License-Identifier: Apache-2.0
"""Other inferences of the clients' mixtures, from what FedFusion's server remembers, and a score.

None is told the number of components.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from sklearn.cluster import KMeans
from sklearn.metrics import adjusted_rand_score, silhouette_score
from sklearn.mixture import GaussianMixture
from torch import Tensor
from torch.nn.functional import one_hot

from fedfusion_flwr.fusion.initialization import archetypes, clear_groups
from fedfusion_flwr.fusion.noise import FEWEST_RESIDUALS, Signals, signals
from fedfusion_flwr.fusion.standardizer import Standardizer
from fedfusion_flwr.tracking.recovery import assignment_error, renumbered

MOST = 8
"""Components that an inference may find, as many as FedFusion's default."""


class Remembered(NamedTuple):
    """What the server knows of K clients after a round.

    ``vectors`` are means over ``rounds`` rounds, ``smoothed`` the first version's moving averages,
    both (K, D); ``residuals`` (R, D) are draws of one round's noise, if there are any.
    """

    clients: list[int]
    vectors: Tensor
    smoothed: Tensor
    rounds: Tensor
    examples: Tensor
    residuals: Tensor | None


def whitened(known: Remembered) -> Signals:
    """The clients in the directions that stand above the noise, as the VAE sees them."""
    scaler, residuals = Standardizer.of(known.vectors), known.residuals
    noise = None
    if residuals is not None and len(residuals) >= FEWEST_RESIDUALS:
        noise = scaler.without_center().standardize(residuals)
    most = min(MOST, len(known.clients)) - 1
    return signals(scaler.standardize(known.vectors), known.rounds.double(), noise, most)


def hard(labels: np.ndarray) -> Tensor:
    """Labels (K,) as memberships (K, G)."""
    return one_hot(torch.as_tensor(labels, dtype=torch.int64)).double()


def k_means(x: Tensor) -> Tensor:
    """The first version's start: the most groups whose silhouette is 0.9 of the best or more."""
    points = x.double().numpy()
    if not points.shape[1]:
        return torch.ones(len(points), 1).double()
    found = {}
    for groups in range(2, min(MOST, len(points) - 1) + 1):
        labels = KMeans(groups, n_init=10, random_state=0).fit_predict(points)
        found[float(silhouette_score(points, labels)), groups] = labels
    best = max(score for score, _ in found)
    if best <= 0.1:
        return torch.ones(len(points), 1).double()
    most = max(groups for score, groups in found if score >= 0.9 * best)
    return next(hard(labels) for (_, groups), labels in found.items() if groups == most)


def gaussian_mixture(found: Signals) -> Tensor:
    """Responsibilities; the covariance's kind and the number of components by BIC.

    No component is narrower than the noise.
    """
    points = found.x.numpy()
    if not points.shape[1]:
        return torch.ones(len(points), 1).double()
    least = max(1e-6, float(found.variance.mean()))
    fitted = [
        GaussianMixture(
            groups, covariance_type=kind, n_init=5, reg_covar=least, random_state=0
        ).fit(points)
        for kind in ("spherical", "diag")
        for groups in range(1, min(MOST, len(points) - 1) + 1)
    ]
    chosen = min(fitted, key=lambda mixture: float(mixture.bic(points)))
    return torch.as_tensor(chosen.predict_proba(points))


def corners(x: Tensor) -> Tensor:
    """Memberships in P + 1 archetypes."""
    return archetypes(x, x.shape[1] + 1) if x.shape[1] else torch.ones(len(x), 1).double()


def vae_start(known: Remembered) -> Tensor:
    """What the VAE goes on from: clear groups, and archetypes where none are clear."""
    x = whitened(known).x
    labels = clear_groups(x, MOST) if x.shape[1] else None
    return corners(x) if labels is None else hard(labels.numpy())


def smoothed_k_means(known: Remembered) -> Tensor:
    """As the first version did it: nothing is known of the noise."""
    return k_means(Standardizer.of(known.smoothed).standardize(known.smoothed))


AT_ONCE: dict[str, Callable[[Remembered], Tensor]] = {
    "its start alone": vae_start,
    "k-means": smoothed_k_means,
    "k-means, whitened": lambda known: k_means(whitened(known).x),
    "Gaussian mixture": lambda known: gaussian_mixture(whitened(known)),
    "archetypes": lambda known: corners(whitened(known).x),
}


def scores(b: Tensor, planted: Tensor, examples: Tensor) -> dict[str, float]:
    """How near memberships b (K, M) of clients with ``examples`` (K,) are to those planted."""
    true, found, _ = renumbered(planted.double().numpy(), b.double().numpy())
    share = (examples / examples.sum()).double().numpy()
    main, groups = found.argmax(1), true.argmax(1)
    return {
        "b-error": assignment_error(true, found),
        "pi-error": float(np.abs(share @ (found - true)).sum() / 2),
        "occupied": len(np.unique(main)),
        "planted": len(np.unique(groups)),
        "adjusted-rand-index": float(adjusted_rand_score(groups, main)),
    }
