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

from fedfusion_flwr.fusion.standardizer import Standardizer
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
