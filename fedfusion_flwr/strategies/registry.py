# SPDX-License-Identifier: Apache-2.0
"""Strategies by name, each built from a `RunConfig`."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from logging import WARNING
from typing import Any, NamedTuple

from flwr.common.logger import log

from fedfusion_flwr.config import RunConfig
from fedfusion_flwr.federation.defence import MAX_CLIENT_WEIGHT, Defence
from fedfusion_flwr.federation.engine import BaseStrategy
from fedfusion_flwr.federation.round import RoundCallback
from fedfusion_flwr.fusion import DistributionInference
from fedfusion_flwr.strategies.fedavg import FedAvg, FedAvgM
from fedfusion_flwr.strategies.fedbn import FedBN
from fedfusion_flwr.strategies.fedcluster import FedCluster
from fedfusion_flwr.strategies.fedcluster_cycling import FedClusterCycling
from fedfusion_flwr.strategies.fedfusion import FedFusion
from fedfusion_flwr.strategies.fedgroup import FedGroup
from fedfusion_flwr.strategies.fedma import FedMA
from fedfusion_flwr.strategies.fedma.layers import PlainNetwork
from fedfusion_flwr.strategies.fedprox import FedProx
from fedfusion_flwr.strategies.fesem import FeSEM
from fedfusion_flwr.strategies.ifca import IFCA
from fedfusion_flwr.strategies.multi import InitialState, MultiModelStrategy


class StrategyEntry(NamedTuple):
    """A strategy of the registry.

    Attributes
    ----------
    strategy : type[BaseStrategy]
        Its class.
    keys : tuple[str, ...]
        The fields of `RunConfig` that it reads and not every strategy does; its constructor's
        arguments of the same names.
    """

    strategy: type[BaseStrategy]
    keys: tuple[str, ...] = ()


_SHARED = (
    "seed",
    "pool_moments",
    "evaluate_every",
    "central_evaluate_every",
    "min_valid_replies",
    "max_failed_rounds",
    "max_examples",
    "max_update_ratio",
    "node_timeout",
    "statistics_layers",
    "fraction_train",
    "fraction_evaluate",
)
_SERVER_STEP = ("server_learning_rate", "server_momentum", "average_decay")
_DEFENCE = ("outlier_threshold", "clip_quantile", "max_examples_ratio")
_INFERENCE = ("vae_steps", "vae_refit_steps", "vae_learning_rate")

REGISTRY: dict[str, StrategyEntry] = {
    "fedfusion": StrategyEntry(
        FedFusion,
        (
            *_SERVER_STEP,
            "max_client_weight",
            "num_components",
            "mixture",
            "balance_exponent",
            "sampling",
            "absent",
            "assignment_smoothing",
            "vae_step",
        ),
    ),
    "fedavg": StrategyEntry(FedAvg, ("max_client_weight",)),
    "fedavgm": StrategyEntry(FedAvgM, (*_SERVER_STEP, "max_client_weight")),
    "fedprox": StrategyEntry(FedProx, ("proximal_mu", "max_client_weight")),
    "fed-gn": StrategyEntry(FedAvg, ("max_client_weight",)),
    "fedbn": StrategyEntry(FedBN, ("max_client_weight",)),
    "fedma": StrategyEntry(FedMA, ("matching_width", "matching_gamma", "matching_sweeps")),
    "fesem": StrategyEntry(FeSEM, ("num_clusters", "centre_update", "warm_start")),
    "ifca": StrategyEntry(IFCA, ("num_clusters", "warmup_rounds")),
    "fedcluster": StrategyEntry(
        FedCluster, ("num_clusters", "cluster_round", "distance_threshold", "linkage")
    ),
    "fedcluster-cycling": StrategyEntry(
        FedClusterCycling, ("num_clusters", "reshuffle_cycle", "max_client_weight")
    ),
    "fedgroup": StrategyEntry(
        FedGroup, ("num_clusters", "pretrain_steps", "pretrain_clients", "inter_group_rate")
    ),
}


def build_strategy(
    config: RunConfig,
    callbacks: Sequence[RoundCallback] = (),
    initial_state: InitialState | None = None,
    network: PlainNetwork | None = None,
) -> BaseStrategy:
    """The strategy that ``config.strategy`` names.

    Parameters
    ----------
    config : RunConfig
        Of the run.
    callbacks : Sequence[RoundCallback]
        See every round's report.
    initial_state : Callable[[int], State] or None
        Makes different untrained models, for strategies that start from several.
    network : PlainNetwork or None
        The model's layers, for strategies that match their units.
    """
    strategy, keys = REGISTRY[config.strategy]
    _warn_of_idle_keys(config, keys)
    arguments: dict[str, Any] = {key: getattr(config, key) for key in (*_SHARED, *keys)}
    if config.defence == "robust":
        arguments["defence"] = Defence(**{key: getattr(config, key) for key in _DEFENCE})
        if arguments.get("max_client_weight") == 1:
            arguments["max_client_weight"] = MAX_CLIENT_WEIGHT
    if strategy is FedFusion:
        arguments["inference"] = DistributionInference(
            config.num_components,
            config.seed,
            steps=config.vae_steps,
            refit_steps=config.vae_refit_steps,
            learning_rate=config.vae_learning_rate,
        )
    if issubclass(strategy, MultiModelStrategy | FedMA):
        arguments["initial_state"] = initial_state
    if issubclass(strategy, FedMA):
        arguments["network"] = network
    return strategy(
        callbacks=callbacks,
        min_train_nodes=1,
        min_evaluate_nodes=1,
        min_available_nodes=config.num_first_clients,
        **arguments,
    )


def _warn_of_idle_keys(config: RunConfig, keys: Sequence[str]) -> None:
    """Tell of keys that were changed, but that the chosen strategy does not read."""
    read = {*keys, *(_INFERENCE if config.strategy == "fedfusion" else ())}
    particular = {key for entry in REGISTRY.values() for key in entry.keys} | {*_INFERENCE}
    defaults = {field.name: field.default for field in dataclasses.fields(config)}
    for key in sorted(particular - read):
        if getattr(config, key) != defaults[key]:
            _warn_of_idle_key(key, "strategy", config.strategy)
    for key in _DEFENCE if config.defence == "none" else ():
        if getattr(config, key) != defaults[key]:
            _warn_of_idle_key(key, "defence", config.defence)


def _warn_of_idle_key(key: str, choice: str, chosen: str) -> None:
    log(
        WARNING,
        "run-config key '%s' has no effect with %s '%s'",
        *(key.replace("_", "-"), choice, chosen),
    )
