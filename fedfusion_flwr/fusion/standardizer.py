# SPDX-License-Identifier: Apache-2.0
"""One scale for all statistics, which differ by orders of magnitude between layers and kinds."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fedfusion_flwr.fusion.threads import pieces, side_by_side

FEATURE_CLAMP = 5.0
ROBUST_LIMIT = 3.0
_STD_FLOOR = 1e-8
MAD_TO_STD = 1.4826
"""Standard deviation over median absolute deviation, of a normal distribution."""
COLUMNS = 128
"""Features processed at a time, for all clients."""

_MANY_CLIENTS = 1000


def some_clients(count: int) -> Tensor:
    """Rows of at most a thousand clients, for what is too slow with more; the same every round.

    A random sample, because clients may be registered in an order that repeats; up to a thousand,
    all of them in order.
    """
    if count <= _MANY_CLIENTS:
        return torch.arange(count)
    return torch.randperm(count, generator=torch.Generator().manual_seed(0))[:_MANY_CLIENTS]


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
        median: otherwise one far client would shrink the differences between all others to 0.
        """
        center, spread = torch.empty(2, x.shape[1], dtype=torch.float64)

        def measure(columns: slice) -> None:
            center[columns], spread[columns] = _location_and_scale(x[:, columns])

        side_by_side(measure, pieces(x.shape[1], COLUMNS))
        informative = spread > _STD_FLOOR * center.abs().clamp_min(1.0)
        return cls(center, torch.where(informative, spread, torch.ones_like(spread)), informative)

    def without_center(self) -> Standardizer:
        """The same scale, for differences of statistics."""
        return Standardizer(torch.zeros_like(self.center), self.unit, self.informative)

    def standardize(self, x: Tensor) -> Tensor:
        """To zero mean and unit variance, clamped to +-5, float32."""
        z = (x - self.center.to(x.dtype)).float()
        return z.mul_((self.informative / self.unit).float()).clamp_(-FEATURE_CLAMP, FEATURE_CLAMP)


def _location_and_scale(columns: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the limited values of some features (K, D')."""
    # A copy, in which the rest is done in place.
    values = columns.T.clone(memory_format=torch.contiguous_format)
    sample = values[:, some_clients(values.shape[1])]
    median = sample.median(1, keepdim=True).values
    deviation = MAD_TO_STD * sample.sub_(median).abs_().median(1, keepdim=True).values
    # Where most clients agree exactly, the others are the signal: no limit.
    limit = torch.where(deviation > 0, ROBUST_LIMIT * deviation, torch.inf)
    torch.maximum(values, median - limit, out=values)
    torch.minimum(values, median + limit, out=values)
    mean = values.mean(1, dtype=torch.float64)
    values.sub_(mean.unsqueeze(1).to(values.dtype)).square_()
    return mean, values.mean(1, dtype=torch.float64).sqrt()
