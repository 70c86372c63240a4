# SPDX-License-Identifier: Apache-2.0
"""What of the clients' statistics tells them apart, and what is noise.

A client reports every round, so that noise need not be assumed: it is measured, as the spread of a
client's statistics around that client's own mean.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

FEWEST_RESIDUALS = 8
"""With fewer, noise is unknown."""
_LEAST_NOISE = 1e-3
"""Of the clients' spread: noise is never taken to be less."""
_FLOOR = 1e-6


def whitening(residuals: Tensor) -> Tensor:
    """A matrix W (F, F) such that noise e becomes e @ W of unit covariance.

    The residuals' covariance is shrunk towards a multiple of the identity (Ledoit & Wolf 2004),
    after every feature was divided by its own root mean square.

    Parameters
    ----------
    residuals : Tensor
        Draws of the noise, mean 0, shape (R, F), float64.
    """
    from sklearn.covariance import ledoit_wolf

    # The features come standardized over clients; one without noise must not outweigh all others.
    unit = residuals.square().mean(0).sqrt().clamp_min(_LEAST_NOISE)
    covariance = torch.as_tensor(ledoit_wolf((residuals / unit).numpy(), assume_centered=True)[0])
    values, vectors = torch.linalg.eigh(covariance)
    values = values.clamp_min(_LEAST_NOISE)
    root: Tensor = (vectors / values.sqrt()) @ vectors.T
    return root / unit.unsqueeze(1)


def number_of_signals(eigenvalues: Tensor, clients: int, features: int) -> int:
    """How many principal directions stand above noise of unknown level.

    Those whose eigenvalue is above omega(beta)^2 times the median (Gavish & Donoho 2014, eq. 5 and
    7; beta is the smaller over the larger side of the matrix).

    Parameters
    ----------
    eigenvalues : Tensor
        Of the clients' covariance, descending.
    clients, features : int
        K, at least 2, and F.
    """
    values = eigenvalues[: min(clients - 1, features)]
    sides = sorted((clients - 1, features))
    beta = sides[0] / sides[1]
    omega = 0.56 * beta**3 - 0.95 * beta**2 + 1.82 * beta + 1.43
    level = max(omega**2 * float(values.median()), _FLOOR * float(values[0]))
    return int((values > level).sum())


@dataclass(frozen=True)
class Signals:
    """Clients in the directions that tell them apart.

    Attributes
    ----------
    features : Tensor
        The clients' centred features, (K, F).
    directions : Tensor
        Shape (F, P), strongest first; may be rotated and scaled.
    variance : Tensor
        Noise variance v of every client in each direction, (K,); 0 where it is unknown.
    """

    features: Tensor
    directions: Tensor
    variance: Tensor

    @cached_property
    def x(self) -> Tensor:
        """The clients in these directions, (K, P)."""
        return self.features @ self.directions

    def leading(self, count: int) -> Signals:
        """Only the strongest directions, scaled to clients of root mean square 1."""
        unit = self.x[:, :count].square().mean().sqrt()
        return Signals(self.features, self.directions[:, :count] / unit, self.variance / unit**2)

    def turned_towards(self, earlier: Tensor) -> Signals:
        """Rotated towards as many ``earlier`` directions (F, P), by orthogonal Procrustes.

        Principal directions turn and swap from round to round; what was learned in the earlier
        ones stays valid in these.
        """
        left, _, right = torch.linalg.svd(self.x.T @ (self.features @ earlier))
        return replace(self, directions=self.directions @ (left @ right))


def signals(features: Tensor, rounds: Tensor, residuals: Tensor | None, most: int) -> Signals:
    """Whiten the clients' features and find the directions that stand above the noise.

    Parameters
    ----------
    features : Tensor
        Means over rounds, (K, F).
    rounds : Tensor
        Number of rounds of each mean, (K,), at least 1.
    residuals : Tensor or None
        Draws of one round's noise (R, F); without them features are not weighted by noise.
    most : int
        Largest number of directions.
    """
    centered = features.double() - features.double().mean(0)
    # Clients that repeat themselves exactly have no noise to weight features by.
    noisy = residuals is not None and residuals.any()
    white = whitening(residuals.double()) if residuals is not None and noisy else None
    x = centered if white is None else centered @ white
    # A client seen more often says more about where the directions are.
    weighted = x * (rounds / rounds.mean()).sqrt().unsqueeze(1)
    if len(x) <= x.shape[1]:
        values, vectors = torch.linalg.eigh(weighted @ weighted.T)
        vectors = weighted.T @ vectors / values.clamp_min(1e-300).sqrt()
    else:
        values, vectors = torch.linalg.eigh(weighted.T @ weighted)
    found = min(number_of_signals(values.flip(0), len(x), x.shape[1]), most)
    directions = vectors.flip(1)[:, :found]
    if white is not None:
        directions = white @ directions
    noise = torch.zeros(len(x)) if white is None else 1 / rounds
    return Signals(centered, directions, noise.double())
