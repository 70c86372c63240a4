# SPDX-License-Identifier: Apache-2.0
"""Strategies by name, each built from a `RunConfig`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from fedfusion_flwr.config import RunConfig
from fedfusion_flwr.fusion import DistributionInference
from fedfusion_flwr.rounds import RoundCallback
from fedfusion_flwr.strategies.base import BaseStrategy, RunStopped
from fedfusion_flwr.strategies.fedavg import FedAvg
from fedfusion_flwr.strategies.fedfusion import FedFusion
from fedfusion_flwr.strategies.fit import check_fits
from fedfusion_flwr.strategies.roster import NotEnoughNodes

__all__ = [
    "REGISTRY",
    "BaseStrategy",
    "FedAvg",
    "FedFusion",
    "NotEnoughNodes",
    "RunStopped",
    "build_strategy",
    "check_fits",
]


def _base_arguments(config: RunConfig) -> dict[str, Any]:
    return {
        "seed": config.seed,
        "server_learning_rate": config.server_learning_rate,
        "server_momentum": config.server_momentum,
        "average_decay": config.average_decay,
        "pool_moments": config.pool_moments,
        "max_client_weight": config.max_client_weight,
        "min_valid_replies": config.min_valid_replies,
        "max_failed_rounds": config.max_failed_rounds,
        "max_examples": config.max_examples,
        "max_update_ratio": config.max_update_ratio,
        "node_timeout": config.node_timeout,
        "statistics_layers": config.statistics_layers,
        "fraction_train": config.fraction_train,
        "fraction_evaluate": config.fraction_evaluate,
        "min_train_nodes": 1,
        "min_evaluate_nodes": 1,
        "min_available_nodes": config.num_clients,
    }


def _fedavg(config: RunConfig, callbacks: Sequence[RoundCallback]) -> BaseStrategy:
    return FedAvg(callbacks=callbacks, **_base_arguments(config))


def _fedfusion(config: RunConfig, callbacks: Sequence[RoundCallback]) -> BaseStrategy:
    return FedFusion(
        num_components=config.num_components,
        mixture=config.mixture,  # type: ignore[arg-type]
        balance_exponent=config.balance_exponent,
        sampling=config.sampling,  # type: ignore[arg-type]
        absent=config.absent,  # type: ignore[arg-type]
        assignment_smoothing=config.assignment_smoothing,
        vae_step=config.vae_step,
        inference=DistributionInference(
            config.num_components,
            config.seed,
            steps=config.vae_steps,
            refit_steps=config.vae_refit_steps,
            learning_rate=config.vae_learning_rate,
        ),
        callbacks=callbacks,
        **_base_arguments(config),
    )


REGISTRY: dict[str, Callable[[RunConfig, Sequence[RoundCallback]], BaseStrategy]] = {
    "fedavg": _fedavg,
    "fedfusion": _fedfusion,
}


def build_strategy(config: RunConfig, callbacks: Sequence[RoundCallback] = ()) -> BaseStrategy:
    """The strategy that ``config.strategy`` names."""
    return REGISTRY[config.strategy](config, callbacks)
