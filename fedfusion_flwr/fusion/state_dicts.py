# SPDX-License-Identifier: Apache-2.0
"""Weighted fusion of whole models.

Models are larger than the processor's caches, so each client's model is read once, in blocks.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from fedfusion_flwr.fusion.statistics import batchnorm_prefixes

State = dict[str, Tensor]

_BUFFERS = ("running_mean", "running_var", "num_batches_tracked")

BLOCK = 1 << 18
"""Elements of a block: two blocks of float64 fit the caches, and there are few calls."""


def is_parameter(key: str, value: Tensor) -> bool:
    """Whether a state-dict entry is stepped; buffers and integers are replaced instead."""
    return value.is_floating_point() and key.rpartition(".")[2] not in _BUFFERS


def fuse_state_dicts(
    states: Iterable[Mapping[str, Tensor]], weights: Tensor, *, pool_moments: bool = True
) -> State:
    """Weighted fusion of state dicts, with no more memory than the result needs.

    Parameters and float buffers are averaged, in float64. BatchNorm running statistics are fused as
    moments of the mixture, mean = sum p mu, var = sum p (var + mu^2) - mean^2, because averaging
    variances loses the spread between clients. Integer buffers (``num_batches_tracked``) take the
    maximum. The bits do not depend on the number of threads.

    Parameters
    ----------
    states : Iterable[Mapping[str, Tensor]]
        One state dict per client, with equal keys and shapes; consumed once.
    weights : Tensor
        p, shape (K,), non-negative, sums to 1.
    pool_moments : bool
        False averages running variances like any other tensor, as plain FedAvg implementations do.

    Raises
    ------
    ValueError
        If there are no states, or their number, keys or shapes do not agree.
    """
    models, p = list(states), weights.double().tolist()
    _check_alike(models, len(p))
    variances: set[str] = set()
    if pool_moments:
        variances = {f"{prefix}running_var" for prefix in batchnorm_prefixes(models[0])}
    fused: State = {}
    for key, value in models[0].items():
        tensors = [model[key] for model in models]
        if not value.is_floating_point():
            fused[key] = _maximum(tensors)
        elif key in variances:
            mean = key.removesuffix("running_var") + "running_mean"
            fused[key] = _pooled_variance(tensors, [model[mean] for model in models], p)
        else:
            fused[key] = _weighted_sum(tensors, p)
    return fused


def _check_alike(models: Sequence[Mapping[str, Tensor]], count: int) -> None:
    if len(models) > count:
        raise ValueError(f"more states than the {count} weights")
    if len(models) < count or not models:
        raise ValueError(f"{len(models)} states for {count} weights")
    first = models[0]
    for model in models:
        if model.keys() != first.keys():
            odd = sorted(model.keys() ^ first.keys())
            raise ValueError(f"state dicts differ in their keys: {odd[:3]}")
        for key, value in model.items():
            if value.shape != first[key].shape:
                shapes = f"{tuple(value.shape)} differs from {tuple(first[key].shape)}"
                raise ValueError(f"{key}: shape {shapes}")


def _maximum(tensors: Sequence[Tensor]) -> Tensor:
    largest = tensors[0].clone()
    for tensor in tensors[1:]:
        torch.maximum(largest, tensor, out=largest)
    return largest


def _pooled_variance(
    variances: Sequence[Tensor], means: Sequence[Tensor], weights: Sequence[float]
) -> Tensor:
    """Variance of the mixture, sum p (var + (mu - r)^2) - (sum p mu - r)^2.

    The reference r is near the means, because a large mu^2 would drown a small variance.
    """
    reference = means[0].double()
    center, moment = torch.zeros_like(reference), torch.zeros_like(reference)
    for variance, mean, weight in zip(variances, means, weights, strict=True):
        offset = mean.double() - reference
        center.add_(mean.double(), alpha=weight)
        moment.add_(offset.square_().add_(variance.double()), alpha=weight)
    return moment.sub_(center.sub_(reference).square_()).clamp_min_(0).to(variances[0].dtype)


def _weighted_sum(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    result = torch.empty(tensors[0].shape, dtype=tensors[0].dtype)
    flat = [tensor.reshape(-1) for tensor in tensors]
    for start in range(0, result.numel(), BLOCK):
        block = result.view(-1)[start : start + BLOCK]
        total = torch.zeros(len(block), dtype=torch.float64)
        term = torch.empty_like(total)
        for values, weight in zip(flat, weights, strict=True):
            term.copy_(values[start : start + BLOCK])
            total.add_(term, alpha=weight)
        block.copy_(total)
    return result
