# SPDX-License-Identifier: Apache-2.0
"""Wide statistics made narrow, in one reading and without a projection matrix.

A ResNet18 has 19,200 normalization parameters: far more than the inference needs, and a matrix that
projects them is larger than the statistics of most federations.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fedfusion_flwr.fusion.standardizer import COLUMNS, Standardizer
from fedfusion_flwr.fusion.threads import pieces, side_by_side

ROWS = 64
"""Clients at a time: their standardized statistics need not all be in memory."""


class Folding:
    """Feature hashing with equal buckets: standardized features, with random signs and in random
    order, are added up in ``max_width`` sums, each over the root of how many there are in it.

    The squared distance of two clients becomes, in expectation, F / D of what it was (Weinberger et
    al. 2009, feature hashing; Charikar et al. 2002, count sketch). Narrower statistics stay as they
    are.

    Parameters
    ----------
    width : int
        D, of the statistics.
    max_width : int
        F, at least 1.
    seed : int
        Of order and signs.
    """

    def __init__(self, width: int, max_width: int, seed: int) -> None:
        self.folds = width > max_width
        self._layers = math.ceil(width / max_width)
        self._max_width = max_width
        if self.folds:
            generator = torch.Generator().manual_seed(seed)
            self._order = torch.randperm(width, generator=generator)
            signs = torch.randint(0, 2, (width,), generator=generator) * 2 - 1
            self._signs = signs / math.sqrt(self._layers)

    def features(self, scaler: Standardizer, x: Tensor) -> Tensor:
        """Standardize statistics x (K, D) and fold them: (K, min(D, F)), float32."""
        folded = torch.empty(len(x), min(x.shape[1], self._max_width))

        def fold(rows: slice) -> None:
            folded[rows] = self._fold(scaler.standardize(x[rows]))

        side_by_side(fold, pieces(len(x), ROWS))
        return folded

    def unfold(
        self,
        decoded: Tensor,
        features: Tensor,
        assignments: Tensor,
        scaler: Standardizer,
        x: Tensor,
    ) -> Tensor:
        """Statistics of components that were decoded as features.

        Every component is the affine combination of the clients' group means that fits it best as
        features, and the same combination of the groups' standardized statistics is its answer.

        Parameters
        ----------
        decoded : Tensor
            Components as features, (M, F).
        features, x : Tensor
            The clients' folded features (K, F) and their statistics (K, D).
        assignments : Tensor
            b, (K, M): clients belong to groups as they say.
        scaler : Standardizer
            Of x.

        Returns
        -------
        Tensor
            Standardized statistics, (M, D), float64.
        """
        mass = assignments.sum(0)
        shares = (assignments[:, mass > 0] / mass[mass > 0]).T
        anchors = shares @ features.double()
        center = anchors.mean(0)
        mixing = (decoded.double() - center) @ torch.linalg.pinv(anchors - center, rtol=1e-6)
        weights = mixing + (1 - mixing.sum(1, keepdim=True)) / len(anchors)
        means = torch.empty(len(anchors), x.shape[1], dtype=torch.float64)

        def average(columns: slice) -> None:
            part = scaler.of_features(columns).standardize(x[:, columns])
            means[:, columns] = shares @ part.double()

        side_by_side(average, pieces(x.shape[1], COLUMNS))
        unfolded: Tensor = weights @ means
        return unfolded

    def _fold(self, standardized: Tensor) -> Tensor:
        if not self.folds:
            return standardized
        mixed = standardized[:, self._order].mul_(self._signs)
        missing = self._layers * self._max_width - mixed.shape[1]
        mixed = torch.nn.functional.pad(mixed, (0, missing))
        folded: Tensor = mixed.view(len(mixed), self._layers, self._max_width).sum(1)
        return folded
