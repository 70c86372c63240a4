# SPDX-License-Identifier: Apache-2.0
"""Whether a model has what the strategy and the local training read from it."""

from __future__ import annotations

from logging import WARNING
from typing import cast

from flwr.common.logger import log
from torch import Tensor, nn

from fedfusion_flwr.config import RunConfig
from fedfusion_flwr.fusion import NormalizationStatistics, StatisticsError
from fedfusion_flwr.fusion.statistics import (
    LayerChoice,
    batchnorm_prefixes,
    normalization_layers,
)
from fedfusion_flwr.models import ModelError

READ_STATISTICS = ("fedfusion",)
"""Strategies that need the clients' normalization statistics."""


def check_fits(config: RunConfig, model: nn.Module, examples: Tensor) -> None:
    """Refuse, before any client trains, what would fail or do nothing in every client.

    Parameters
    ----------
    config : RunConfig
        Says which strategy runs and where statistics come from.
    model : nn.Module
        Left as it is.
    examples : Tensor
        Inputs that the model takes, for trying a probe.

    Raises
    ------
    ModelError
        If FedFusion finds no statistics where ``statistics-source`` looks for them, or
        ``local-normalization`` is "fused" and there is no BatchNorm layer.
    """
    named = f"model = {config.model!r} with normalization = {config.model_normalization!r}"
    has_batchnorm = bool(batchnorm_prefixes(model.state_dict()))
    to_batch = "" if config.model_normalization == "batch" else 'normalization = "batch", '
    if config.local_normalization == "fused" and not has_batchnorm:
        raise ModelError(
            f"local-normalization = 'fused' needs running statistics of BatchNorm layers, and "
            f'{named} has none; use {to_batch}local-normalization = "batch" or another model'
        )
    if config.strategy == "fed-gn" and next(normalization_layers(model), None) is None:
        log(
            WARNING,
            "%s has no normalization layer to become group norm: fed-gn is fedavg here",
            named,
        )
    if config.strategy not in READ_STATISTICS:
        return
    remedy = f'{to_batch}another model or a strategy without statistics, such as "fedavg"'
    needs = f"strategy = {config.strategy!r} needs normalization statistics"
    if next(normalization_layers(model), None) is None:
        raise ModelError(f"{needs}, and {named} has no normalization layer; use {remedy}")
    if config.statistics_source == "probe":
        try:
            layers = cast(LayerChoice, config.statistics_layers)
            NormalizationStatistics.probe(model, [examples], layers=layers)
        except StatisticsError as problem:
            raise ModelError(
                f"{needs}, and {named} cannot be probed: {problem}; use {remedy}"
            ) from problem
    elif not has_batchnorm:
        raise ModelError(
            f"{needs}, and {named} has no BatchNorm layer for statistics-source = 'local' to read; "
            f'use statistics-source = "probe", {remedy}'
        )
