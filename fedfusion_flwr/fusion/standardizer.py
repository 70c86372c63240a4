# SPDX-License-Identifier: Apache-2.0
"""Statistics of layers and kinds differ by orders of magnitude; the VAE sees them on one scale."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

FEATURE_CLAMP = 5.0
ROBUST_LIMIT = 3.0
_STD_FLOOR = 1e-8


@dataclass(frozen=True)
class Standardizer:
    """Per-feature location and scale over the clients; constant features map to 0."""

    center: Tensor
    unit: Tensor
    informative: Tensor

    @classmethod
    def of(cls, x: Tensor) -> Standardizer:
        """Measure the clients' statistics x (K, D).

        Each feature is first limited to three robust standard deviations (1.4826 MAD) around its
        median, so that one far client does not squeeze the differences between all others to 0.
        """
        median = x.median(0).values
        deviation = 1.4826 * (x - median).abs().median(0).values
        # Where most clients agree exactly, the rest is the signal: no limit.
        limit = torch.where(deviation > 0, ROBUST_LIMIT * deviation, torch.inf)
        x = torch.minimum(torch.maximum(x, median - limit), median + limit)
        center, spread = x.mean(0), x.std(0, correction=0)
        informative = spread > _STD_FLOOR * center.abs().clamp_min(1.0)
        return cls(center, torch.where(informative, spread, torch.ones_like(spread)), informative)

    def standardize(self, x: Tensor) -> Tensor:
        """To zero mean and unit variance, clamped to +-5, float32."""
        z = torch.where(self.informative, (x - self.center) / self.unit, torch.zeros_like(x))
        return z.clamp(-FEATURE_CLAMP, FEATURE_CLAMP).float()

    def restore(self, z: Tensor) -> Tensor:
        """Back to the units of the input."""
        return self.center + torch.where(self.informative, z * self.unit, torch.zeros_like(z))
