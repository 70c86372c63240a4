# SPDX-License-Identifier: Apache-2.0
"""Normalization parameters d_k = (mu, sigma, beta, gamma): a client's data as the model sees it.

Means, standard deviations, shifts (``bias``) and scales (``weight``) of the normalization layers.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

BATCHNORM_EPS = 1e-5
LayerChoice = Literal["all", "ends"]
NORMALIZATION_MODULES = (_BatchNorm, nn.GroupNorm, nn.LayerNorm)


class StatisticsError(ValueError):
    """A model or state dict that carries no usable normalization parameters."""


@dataclass(frozen=True)
class NormalizationStatistics:
    """Per-channel normalization parameters of one model.

    Layers are concatenated in the order of the state dict, which need not be that of the forward
    pass: ResNet's shortcuts come after the layers that they bypass.

    Attributes
    ----------
    mean, std, shift, scale : Tensor
        mu, sigma, beta and gamma, each of shape (C,), float32. ``std`` is non-negative.
    """

    mean: Tensor
    std: Tensor
    shift: Tensor
    scale: Tensor

    def __post_init__(self) -> None:
        shapes = {tuple(t.shape) for t in (self.mean, self.std, self.shift, self.scale)}
        if len(shapes) != 1 or len(self.mean.shape) != 1:
            raise StatisticsError(
                f"mean, std, shift and scale must be vectors of one length, got {shapes}"
            )

    @classmethod
    def from_state_dict(
        cls, state: Mapping[str, Tensor], *, layers: LayerChoice = "all", eps: float = BATCHNORM_EPS
    ) -> NormalizationStatistics:
        """Read the parameters of every BatchNorm layer in a state dict.

        Parameters
        ----------
        state : Mapping[str, Tensor]
            A full state dict, buffers included. Layers without affine parameters count as
            shift 0 and scale 1.
        layers : {"all", "ends"}
            All layers, or only the first and the last (the published setting for deep models).
        eps : float
            Added to the running variance before the root, as BatchNorm does.

        Raises
        ------
        StatisticsError
            If the state dict has no running statistics.
        """
        prefixes = select_layers(batchnorm_prefixes(state), layers)
        if not prefixes:
            raise StatisticsError(
                "the model has no BatchNorm running statistics to infer from; use a model with "
                "BatchNorm layers, or statistics-source = 'probe' for other normalization layers"
            )
        parts: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
        for prefix in prefixes:
            mean = state[f"{prefix}running_mean"].float()
            variance = state[f"{prefix}running_var"].float()
            if not variance.isfinite().all() or (variance < 0).any():
                raise StatisticsError(f"'{prefix}running_var' must be finite and non-negative")
            shift = state.get(f"{prefix}bias", torch.zeros_like(mean)).float()
            scale = state.get(f"{prefix}weight", torch.ones_like(mean)).float()
            parts.append((mean, (variance + eps).sqrt(), shift, scale))
        return cls(*(torch.cat(column) for column in zip(*parts, strict=True)))

    @classmethod
    def probe(
        cls, model: nn.Module, batches: Iterable[Tensor], *, layers: LayerChoice = "all"
    ) -> NormalizationStatistics:
        """Moments of some data at the inputs of the model's normalization layers.

        One forward pass in eval mode, which leaves the model as it was. BatchNorm, GroupNorm and
        LayerNorm all work, because their inputs are measured and not their buffers. In a model that
        mixes them, only BatchNorm layers count, as in `from_state_dict`.

        Parameters
        ----------
        model : nn.Module
            The model to measure with.
        batches : Iterable[Tensor]
            Its inputs.
        layers : {"all", "ends"}
            As in `from_state_dict`.

        Raises
        ------
        StatisticsError
            If the model has no normalization layer, there is no data, or the moments are not finite
            (a deep model whose running statistics are still the initial ones).
        """
        modules = dict(normalization_layers(model))
        modules = {n: m for n, m in modules.items() if isinstance(m, _BatchNorm)} or modules
        with collected_moments(modules) as moments, _evaluating(model), torch.no_grad():
            for batch in batches:
                model(batch)
        if not modules:
            raise StatisticsError(
                f"{type(model).__name__} has no normalization layer; FedFusion needs one"
            )
        parts: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
        for name in select_layers(list(modules), layers):
            mean, variance = moments[name].result()
            shift, scale = _affine(modules[name], mean)
            if shift.shape != mean.shape:
                raise StatisticsError(
                    f"layer '{name}' normalizes over {tuple(shift.shape)}; only one channel axis "
                    "is supported"
                )
            std = (variance + BATCHNORM_EPS).sqrt()
            parts.append((mean.float(), std.float(), shift, scale))
        found = cls(*(torch.cat(column).cpu() for column in zip(*parts, strict=True)))
        if not found.vector().isfinite().all():
            raise StatisticsError(
                f"the moments of the data under this {type(model).__name__} are not finite: its "
                "running statistics have seen too few batches"
            )
        return found

    def blurred(self, amount: float, generator: torch.Generator) -> NormalizationStatistics:
        """With Gaussian noise of ``amount`` standard deviations of the data in every channel.

        Means move by ``amount`` * std * g and shifts by ``amount`` * abs(scale) * g; std and scale
        are multiplied by exp(``amount`` * g). Every g is an independent standard normal draw.
        """
        draws = torch.randn(4, len(self.mean), generator=generator)
        by_mean, by_std, by_shift, by_scale = amount * draws
        return NormalizationStatistics(
            self.mean + self.std * by_mean,
            self.std * by_std.exp(),
            self.shift + self.scale.abs() * by_shift,
            self.scale * by_scale.exp(),
        )

    def vector(self, *, log_std: bool = False) -> Tensor:
        """The concatenation (mean, std, shift, scale), shape (4C,); ``log_std`` takes log sigma."""
        std = self.std.clamp_min(BATCHNORM_EPS).log() if log_std else self.std
        return torch.cat([self.mean, std, self.shift, self.scale])


class ChannelMoments:
    """Running count, sum and sum of squares per channel, in float64."""

    def __init__(self) -> None:
        self.count = 0
        self.total = self.total_square = torch.zeros((), dtype=torch.float64)

    def add(self, values: Tensor) -> None:
        """Add rows of shape (N, C)."""
        values = values.double()
        self.count += len(values)
        self.total = self.total + values.sum(0)
        self.total_square = self.total_square + values.square().sum(0)

    def result(self) -> tuple[Tensor, Tensor]:
        """Mean and biased variance, each (C,), float64."""
        if not self.count:
            raise StatisticsError("no data passed through the normalization layer")
        mean = self.total / self.count
        return mean, (self.total_square / self.count - mean.square()).clamp_min(0)


@contextmanager
def collected_moments(modules: Mapping[str, nn.Module]) -> Iterator[dict[str, ChannelMoments]]:
    """Record the per-channel input moments of normalization modules within a ``with`` block."""
    moments = {name: ChannelMoments() for name in modules}

    def record(name: str, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        value = inputs[0].detach()
        channel_dim = -1 if isinstance(module, nn.LayerNorm) else 1
        moments[name].add(value.movedim(channel_dim, -1).reshape(-1, value.shape[channel_dim]))

    handles = [m.register_forward_pre_hook(partial(record, name)) for name, m in modules.items()]
    try:
        yield moments
    finally:
        for handle in handles:
            handle.remove()


def normalization_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The model's normalization modules with their names, in definition order."""
    for name, module in model.named_modules():
        if isinstance(module, NORMALIZATION_MODULES):
            yield name, module


def batchnorm_prefixes(state: Mapping[str, object]) -> list[str]:
    """Key prefixes (``"features.1."``) of the layers that carry running statistics."""
    means = (key.removesuffix("running_mean") for key in state if key.endswith("running_mean"))
    return [prefix for prefix in means if f"{prefix}running_var" in state]


def select_layers(names: list[str], layers: LayerChoice) -> list[str]:
    """All names, or only the first and the last."""
    return names if layers == "all" or len(names) <= 2 else [names[0], names[-1]]


def pooled_moments(means: Tensor, variances: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of a mixture of K populations, from theirs (law of total variance).

    mean = sum_k p_k mu_k;  var = sum_k p_k (var_k + mu_k^2) - mean^2, in float64, floored at 0.

    Parameters
    ----------
    means, variances : Tensor
        Shape (K, C); variances non-negative.
    weights : Tensor
        Shape (K,), non-negative, not all zero; need not sum to 1.

    Returns
    -------
    tuple[Tensor, Tensor]
        Mean and variance, each (C,), float64.

    Raises
    ------
    ValueError
        If shapes do not fit.
    """
    if means.shape != variances.shape or means.shape[:1] != weights.shape:
        raise ValueError(
            f"means {tuple(means.shape)}, variances {tuple(variances.shape)} and weights "
            f"{tuple(weights.shape)} do not fit (K, C), (K, C), (K,)"
        )
    p = weights.double()
    p = p / p.sum()
    mu = means.double()
    mean = p @ mu
    # The centred form equals the textbook's but loses no digits where |mean| >> sigma.
    variance = p @ (variances.double() + (mu - mean).square())
    return mean, variance.clamp_min(0)


def _affine(module: nn.Module, like: Tensor) -> tuple[Tensor, Tensor]:
    shift, scale = getattr(module, "bias", None), getattr(module, "weight", None)
    ones = torch.ones_like(like, dtype=torch.float32)
    return (
        shift.detach().float() if isinstance(shift, Tensor) else ones * 0,
        scale.detach().float() if isinstance(scale, Tensor) else ones,
    )


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
