# SPDX-License-Identifier: Apache-2.0
"""Run-config overrides: how tables of them are merged, and rounds of equal gradient steps."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from fedfusion_flwr.config import RunConfig, Value

Overrides = dict[str, Value]

_TRAINS_EVERYBODY_ONCE = ("fesem", "fedcluster", "fedgroup")


def slug(*parts: str) -> str:
    """Lower-case letters, digits, dots and hyphens: fit for a file name."""
    return re.sub(r"[^a-z0-9.]+", "-", "-".join(parts).lower()).strip("-")


def merged(*overrides: Mapping[str, Value]) -> Overrides:
    """One table of overrides; of two that name a key, the later counts."""
    result: Overrides = {}
    for table in overrides:
        result |= table
    return result


def equal_rounds(config: RunConfig) -> int:
    """Rounds in which a strategy takes as many gradient steps as FedAvg in num-server-rounds.

    Clusters that take turns train a share of the clients a round, so there are more rounds;
    strategies that train everybody once beforehand, have as many rounds less as that is worth.
    Up to the size of the clients, which differ; rows tell the steps that were taken.
    """
    rounds = config.num_server_rounds
    if config.strategy == "fedcluster-cycling":
        return rounds * min(config.num_clusters, config.num_clients)
    once = config.strategy in _TRAINS_EVERYBODY_ONCE
    if config.strategy == "fesem":
        once = config.warm_start
    return max(1, rounds - round(config.num_clients / config.num_train_clients)) if once else rounds


def with_equal_steps(config: Mapping[str, Any]) -> Overrides:
    """The same overrides with the strategy's own number of rounds; checks them, too.

    Raises
    ------
    ConfigError
        If they are no run config.
    """
    parsed = RunConfig.from_run_config(config)
    return {**config, "num-server-rounds": equal_rounds(parsed)}
