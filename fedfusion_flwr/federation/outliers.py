# SPDX-License-Identifier: Apache-2.0
"""Robust statistics over one round's clients: outlier scores, clipping bounds, capped counts.

Scores and caps use medians, which hold as long as fewer than half of the clients are hostile.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fedfusion_flwr.fusion.standardizer import MAD_TO_STD
from fedfusion_flwr.fusion.state_dicts import State, is_parameter
from fedfusion_flwr.fusion.statistics import BATCHNORM_EPS, batchnorm_prefixes

Moments = list[tuple[Tensor, Tensor]]
"""Mean and variance of every normalization layer, each (C,)."""

LEAST_SPREAD = 0.1
"""Smallest unit in which deviations are measured: this part of a standard deviation of the data, or
this much of log sigma^2. Else a tiny difference between clients that agree would look large."""

BOUND_RATE = 0.2
"""How fast `next_bound` follows, as in TensorFlow Federated's clipping."""


def moments_of(state: Mapping[str, Tensor]) -> Moments:
    """Running mean and variance of each BatchNorm layer of a state dict."""
    return [
        (state[f"{p}running_mean"], state[f"{p}running_var"]) for p in batchnorm_prefixes(state)
    ]


def outlier_scores(clients: Sequence[Moments]) -> Tensor:
    """How far each client's normalization statistics lie from the others', layer by layer.

    Per channel, the robust z-score |x - median| / max(1.4826 MAD, unit) over the clients, of the
    mean and of the log-variance; per layer, the larger of their two root mean squares over
    channels. The unit is `LEAST_SPREAD`, for means times the channel's median standard deviation.

    Parameters
    ----------
    clients : Sequence[Moments]
        K of them, with equal layers and channels.

    Returns
    -------
    Tensor
        Shape (K, L), float64, non-negative; a few units for honest clients, however their data
        differ.
    """
    layers: list[Tensor] = []
    for layer in zip(*clients, strict=True):
        mean = torch.stack([m.double() for m, _ in layer])
        log_variance = torch.stack([v.double() for _, v in layer]).add(BATCHNORM_EPS).log()
        std = (_median(log_variance) / 2).exp()
        scores = _scores(mean, LEAST_SPREAD * std), _scores(log_variance, LEAST_SPREAD)
        layers.append(torch.maximum(*scores))
    return torch.stack(layers, dim=1)


def _scores(values: Tensor, unit: Tensor | float) -> Tensor:
    deviation = (values - _median(values)).abs()
    spread = MAD_TO_STD * _median(deviation)
    scores: Tensor = deviation / torch.maximum(spread, torch.as_tensor(unit).double())
    return scores.square().mean(1).sqrt()


def _median(values: Tensor) -> Tensor:
    """Median over the rows; the mean of the middle two if their number is even."""
    ordered, count = values.sort(0).values, len(values)
    return (ordered[(count - 1) // 2] + ordered[count // 2]) / 2


def clip_update(
    state: Mapping[str, Tensor], sent: Mapping[str, Tensor], norm: float, bound: float
) -> State:
    """The model ``sent`` plus the client's update, shortened to ``bound`` if it is longer.

    Parameters
    ----------
    state, sent : Mapping[str, Tensor]
        What a client returned, and what it trained from. Only parameters move; running statistics
        stay the client's.
    norm : float
        Length of the update over the parameters.
    bound : float
        Positive.
    """
    if norm <= bound:
        return dict(state)
    share = bound / norm
    return {
        key: torch.lerp(sent[key].double(), value.double(), share).to(value.dtype)
        if is_parameter(key, value)
        else value
        for key, value in state.items()
    }


def next_bound(bound: float, norms: Sequence[float], quantile: float) -> float:
    """The clipping bound of the next round, which follows a quantile of the update norms.

    C <- C exp(-rate (b - quantile)), where b is the share of norms not above C (Andrew, Thakkar,
    McMahan and Ramaswamy 2021, "Differentially private learning with adaptive clipping"). However
    far out a norm is, it moves C no more than any other.
    """
    below = sum(norm <= bound for norm in norms) / len(norms)
    return bound * math.exp(-BOUND_RATE * (below - quantile))


def cap_counts(counts: Sequence[int], ratio: float) -> list[int]:
    """Limit every count to ``ratio`` times the median of all, at least 1."""
    limit = max(1, math.floor(ratio * statistics.median(counts)))
    return [min(count, limit) for count in counts]
