# SPDX-License-Identifier: Apache-2.0
"""Wide statistics made narrow in one pass, without a projection matrix.

A ResNet18 has 19,200 normalization parameters, far more than the inference needs, and a projection
matrix would be larger than the statistics of most federations.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import pad

from fedfusion_flwr.fusion.standardizer import COLUMNS, Standardizer
from fedfusion_flwr.fusion.threads import pieces, side_by_side

ROWS = 64
"""Clients standardized at a time, so that the memory holds only their statistics."""


class Folding:
    """Feature hashing with equal buckets.

    Standardized features, in random order and with random signs, are added up in ``max_width``
    buckets, and each sum is divided by the square root of the size of a bucket. The expected
    squared distance of two clients is F / D of what it was (Weinberger et al. 2009, feature
    hashing; Charikar et al. 2002, count sketch). Narrow statistics stay as they are.

    Parameters
    ----------
    width : int
        D, the width of the statistics.
    max_width : int
        F, at least 1.
    seed : int
        Decides order and signs.
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
            part = scaler.standardize(x[rows])
            if self.folds:
                missing = self._layers * self._max_width - part.shape[1]
                part = pad(part[:, self._order].mul_(self._signs), (0, missing))
                part = part.view(len(part), self._layers, self._max_width).sum(1)
            folded[rows] = part

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
        """Standardized statistics of components, given their decoded features.

        In the space of features, every component is fitted by an affine combination of the groups'
        means. The same combination of the groups' standardized statistics is the result.

        Parameters
        ----------
        decoded : Tensor
            Components as features, (M, F).
        features, assignments, x : Tensor
            The clients' folded features (K, F), b (K, M), and statistics (K, D).
        scaler : Standardizer
            Of x.

        Returns
        -------
        Tensor
            Shape (M, D), float64.
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
