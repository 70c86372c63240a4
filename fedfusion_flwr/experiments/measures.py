# SPDX-License-Identifier: Apache-2.0
"""How far a federated model's features are from those of centralized training: three measures.

docs/report.md says what each of them answers and what it cannot see. Channel c of one network is
not channel c of another that was trained by itself, so no moments are compared channel by channel
between networks. Pure numpy and torch: no files and no strategies.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
import torch
from torch import Tensor, nn

from fedfusion_flwr.fusion import NormalizationStatistics
from fedfusion_flwr.fusion.statistics import normalization_layers

BIN_EDGES = np.round(np.arange(-20, 21) / 10, 1)
"""Forty bins of 0.1 on [-2, 2)."""
SMOOTHING = 0.01
"""Added to every bin's count."""


def running_values(state: Mapping[str, Tensor]) -> tuple[np.ndarray, np.ndarray]:
    """Running means and running standard deviations of all BatchNorm channels, each (C,).

    Raises
    ------
    StatisticsError
        If the state dict has no running statistics.
    """
    read = NormalizationStatistics.from_state_dict(state)
    return read.mean.double().numpy(), read.std.double().numpy()


def histogram(values: np.ndarray, smoothing: float = SMOOTHING) -> np.ndarray:
    """Shares of the values in the bins, (40,), positive, sum 1; values outside do not count."""
    # Not numpy's histogram: its last bin would hold 2 itself.
    inside = values[(values >= BIN_EDGES[0]) & (values < BIN_EDGES[-1])]
    bins = np.searchsorted(BIN_EDGES, inside, side="right") - 1
    counts = np.bincount(bins, minlength=len(BIN_EDGES) - 1) + smoothing
    return np.asarray(counts / counts.sum())


def histogram_divergence(
    values: np.ndarray, reference: np.ndarray, smoothing: float = SMOOTHING
) -> float:
    """KL(values || reference) of their histograms, in nats.

    sum_i p_i ln(p_i / q_i), p and q the smoothed shares. At least 0; 0 for equal histograms; not
    symmetric; the order of the values plays no part. Empty bins of the reference cost much and by
    an amount that the smoothing sets, so numbers of another smoothing cannot be compared.

    Parameters
    ----------
    values, reference : np.ndarray
        Any numbers, (A,) and (B,); those outside [-2, 2) do not count.
    smoothing : float
        Added to every bin's count, positive.
    """
    p, q = histogram(values, smoothing), histogram(reference, smoothing)
    return float(np.sum(p * np.log(p / q)))


def share_outside(values: np.ndarray) -> float:
    """The share of the values that the histogram does not see."""
    return float(np.mean((values < BIN_EDGES[0]) | (values >= BIN_EDGES[-1])))


def layer_features(model: nn.Module, batches: Iterable[Tensor]) -> dict[str, Tensor]:
    """Each example's channel means at the input of every normalization layer, (N, C) by layer.

    One forward pass in eval mode, in which the model is left.
    """
    found: dict[str, list[Tensor]] = {name: [] for name, _ in normalization_layers(model)}

    def note(name: str, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        channel = -1 if isinstance(module, nn.LayerNorm) else 1
        value = inputs[0].detach().movedim(channel, -1)
        found[name].append(value.reshape(len(value), -1, value.shape[-1]).mean(1).double().cpu())

    handles = [
        module.register_forward_pre_hook(lambda m, i, name=name: note(name, m, i))
        for name, module in normalization_layers(model)
    ]
    try:
        model.eval()
        with torch.inference_mode():
            for batch in batches:
                model(batch)
    finally:
        for handle in handles:
            handle.remove()
    return {name: torch.cat(parts) for name, parts in found.items() if parts}


def feature_distance(x: Tensor, y: Tensor) -> float:
    """1 - linear CKA of two networks' features of the same examples (Kornblith et al., ICML 2019).

    CKA = ||Y'X||_F^2 / (||X'X||_F ||Y'Y||_F) of features centred over the examples. In [0, 1];
    0 for features that a rotation (so a permutation of channels) and a common scale turn into each
    other; symmetric. Near 1 for unrelated features only where examples far outnumber channels.

    Parameters
    ----------
    x, y : Tensor
        Features (N, C) and (N, C'), N at least 2, the same examples in the same order.

    Returns
    -------
    float
        NaN where a network's features are the same for all examples.
    """
    if x.shape[:1] != y.shape[:1]:
        raise ValueError(f"features of {len(x)} and of {len(y)} examples cannot be compared")
    x, y = (features.double() - features.double().mean(0) for features in (x, y))
    norms = (x.T @ x).norm() * (y.T @ y).norm()
    if not norms > 0:
        return float("nan")
    return max(0.0, 1.0 - float((y.T @ x).square().sum() / norms))


def statistics_gap(carried: NormalizationStatistics, measured: NormalizationStatistics) -> float:
    """How little the statistics that a model carries are those of its own features.

    Mean over the channels of the squared Hellinger distance of two normal distributions,
    1 - sqrt(2 s t / (s^2 + t^2)) exp(-(m - n)^2 / (4 (s^2 + t^2))), where (m, s) are the running
    mean and standard deviation and (n, t) those that some data have at the layer's input
    (`NormalizationStatistics.probe`). In [0, 1]; 0 where all agree; symmetric; no permutation,
    shift or scale of a channel changes it. Bounded, so that a few dead channels cannot drown all
    others, as they would with a KL divergence.
    """
    m, s = carried.mean.double(), carried.std.double()
    n, t = measured.mean.double(), measured.std.double()
    total = s.square() + t.square()
    overlap = (2 * s * t / total).sqrt() * torch.exp(-(m - n).square() / (4 * total))
    return float((1 - overlap).mean().clamp(0, 1))
