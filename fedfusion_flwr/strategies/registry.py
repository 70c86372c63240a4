# SPDX-License-Identifier: Apache-2.0
"""Strategies by name, each built from a `RunConfig`.

The built-in ones are found in this package's modules: a class that has a ``name`` is in the
registry. ``"module:Class"`` names one of the user's own.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import importlib
import pkgutil
from collections.abc import Callable, Sequence
from logging import WARNING
from pathlib import Path
from typing import Any

from flwr.common.logger import log
from torch import Tensor, nn

from fedfusion_flwr.config import ConfigError, RunConfig
from fedfusion_flwr.federation.defence import MAX_CLIENT_WEIGHT, Defence
from fedfusion_flwr.federation.round import RoundCallback
from fedfusion_flwr.federation.strategy import FederatedStrategy
from fedfusion_flwr.fusion.statistics import batchnorm_prefixes
from fedfusion_flwr.models import ModelError
from fedfusion_flwr.strategies.clusters import InitialState
from fedfusion_flwr.strategies.fedma.layers import PlainNetwork
from fedfusion_flwr.user_code import load_function

_OF_ONE_MODEL = ("server_learning_rate", "server_momentum", "average_decay", "max_client_weight")
_OWN_STEP = {"server_momentum": 0.5, "average_decay": 0.8}
"""What -1 in the run config means for strategies that have a ``server_step``; for others, 0."""
_KEYS = {field.name: field.default for field in dataclasses.fields(RunConfig)}


def _names(cls: Any) -> list[str]:
    return [field.name for field in dataclasses.fields(cls) if field.init]


_ENGINE = _names(FederatedStrategy)
_SHARED = sorted(_KEYS.keys() & {*_ENGINE} - {*_OF_ONE_MODEL, "defence"})


@functools.cache
def registry() -> dict[str, type[FederatedStrategy]]:
    """The built-in strategies, by name."""
    found: dict[str, type[FederatedStrategy]] = {}
    for module in pkgutil.iter_modules([str(Path(__file__).parent)], f"{__package__}."):
        for value in vars(importlib.import_module(module.name)).values():
            if isinstance(value, type) and issubclass(value, FederatedStrategy) and value.name:
                found[value.name] = value
    return found


def strategy_class(name: str) -> type[FederatedStrategy]:
    """The strategy that the key ``strategy`` names.

    Raises
    ------
    ConfigError
        If there is none of that name, or no such class in the user's module.
    """
    if name in registry():
        return registry()[name]
    if ":" not in name:
        close = difflib.get_close_matches(name, registry(), n=1)
        hint = f"did you mean '{close[0]}'? " if close else ""
        names = ", ".join(f"'{known}'" for known in registry())
        raise ConfigError(
            f"strategy = {name!r} is not allowed: {hint}one of {names}, or your own as "
            "'module:Class'"
        )
    loaded: object = load_function("strategy", name, ConfigError)
    if not isinstance(loaded, type) or not issubclass(loaded, FederatedStrategy):
        raise ConfigError(
            f"`strategy` is {name!r}, but that is not a subclass of "
            "fedfusion_flwr.FederatedStrategy."
        )
    return loaded


def keys_of(strategy: type[FederatedStrategy]) -> tuple[str, ...]:
    """The fields of `RunConfig` that this strategy reads, but not every strategy."""
    own = [name for name in _names(strategy) if name in _KEYS and name not in _ENGINE]
    return (*own, *(_OF_ONE_MODEL if strategy.single_model else ()))


def build_strategy(
    config: RunConfig,
    callbacks: Sequence[RoundCallback] = (),
    initial_state: InitialState | None = None,
    network: Callable[[], PlainNetwork] | None = None,
) -> FederatedStrategy:
    """The strategy that ``config.strategy`` names.

    Parameters
    ----------
    config : RunConfig
        The run's config.
    callbacks : Sequence[RoundCallback]
        Called with every round's report.
    initial_state : Callable[[int], State] or None
        Makes different untrained models, for strategies that start from several.
    network : Callable[[], PlainNetwork] or None
        Finds the model's layers, for strategies that match their units.

    Raises
    ------
    ConfigError
        If there is no such strategy.
    """
    strategy = strategy_class(config.strategy)
    keys = keys_of(strategy)
    _warn_of_idle_keys(config, keys)
    arguments: dict[str, Any] = {key: getattr(config, key) for key in (*_SHARED, *keys)}
    for key, value in _OWN_STEP.items():
        if arguments.get(key) == -1:
            arguments[key] = value if strategy.server_step else 0.0
    if config.defence == "robust":
        arguments["defence"] = Defence.of(config)
        if arguments.get("max_client_weight") == 1:
            arguments["max_client_weight"] = MAX_CLIENT_WEIGHT
    if "initial_state" in _names(strategy):
        arguments["initial_state"] = initial_state
    if "network" in _names(strategy) and network is not None:
        arguments["network"] = network()
    return strategy(
        callbacks=callbacks,
        min_train_nodes=1,
        min_evaluate_nodes=1,
        min_available_nodes=config.num_first_clients,
        **arguments,
    )


def check_fits(config: RunConfig, model: nn.Module, examples: Tensor) -> None:
    """Refuse, before any client trains, a model that would fail in every client.

    Parameters
    ----------
    config : RunConfig
        Names the strategy and how clients normalize.
    model : nn.Module
        Not changed.
    examples : Tensor
        Inputs that the model takes.

    Raises
    ------
    ModelError
        If the model lacks what the strategy reads from it, or ``local-normalization`` is "fused"
        and there is no BatchNorm layer.
    """
    if config.local_normalization == "fused" and not batchnorm_prefixes(model.state_dict()):
        to_batch = "" if config.model_normalization == "batch" else 'normalization = "batch", '
        raise ModelError(
            f"local-normalization = 'fused' needs running statistics of BatchNorm layers, and "
            f"model = {config.model!r} with normalization = {config.model_normalization!r} has "
            f'none; use {to_batch}local-normalization = "batch" or another model'
        )
    strategy_class(config.strategy).check_model(config, model, examples)


def _warn_of_idle_keys(config: RunConfig, keys: Sequence[str]) -> None:
    """Log the keys that were changed but that the chosen strategy does not read."""
    particular = {key for strategy in registry().values() for key in keys_of(strategy)}
    idle = [(key, f"strategy '{config.strategy}'") for key in sorted(particular - set(keys))]
    if config.defence == "none":
        idle += [(key, "defence 'none'") for key in _names(Defence)]
    for key, choice in idle:
        if getattr(config, key) != _KEYS[key]:
            name = key.replace("_", "-")
            log(WARNING, "run-config key '%s' has no effect with %s", name, choice)
