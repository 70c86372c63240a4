# SPDX-License-Identifier: Apache-2.0
"""Cells: single runs, each with all the keys that it overrides."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fedfusion_flwr.config import RunConfig, Value
from fedfusion_flwr.experiments.rows import Row

Overrides = dict[str, Value]

TUNE = "tune"
"""The group of the tuning's cells."""
_TRAINS_EVERYBODY_ONCE = ("fesem", "fedcluster", "fedgroup")


@dataclass(frozen=True)
class Cell:
    """One run of a suite.

    Attributes
    ----------
    group, strategy, dataset, model, partition : str
        Names in the suite.
    seed : int
        Of the run.
    config : dict[str, Value]
        Every run-config key that differs from the app's defaults or that the suite names.
    seconds : float
        What it takes, as the suite says; 0 where it does not.
    candidate : int or None
        Tuning: which of the strategy's candidates.
    """

    group: str
    strategy: str
    dataset: str
    model: str
    partition: str
    seed: int
    config: Overrides
    seconds: float = 0.0
    candidate: int | None = None

    @property
    def id(self) -> str:
        """A file name made of the factors, the same in every session."""
        which = [] if self.candidate is None else [f"c{self.candidate}"]
        parts = (self.group, self.dataset, self.model, self.partition, self.strategy, *which)
        return slug(*parts, f"s{self.seed}")

    def factors(self) -> Row:
        """The first columns of the cell's row."""
        row: Row = {
            "cell": self.id,
            "strategy": self.strategy,
            "dataset": self.dataset,
            "model": self.model,
            "partition": self.partition,
            "seed": self.seed,
            "group": self.group,
        }
        if self.candidate is not None:
            row["candidate"] = self.candidate
        return row | {"config": self.config}

    def is_row(self, row: Row) -> bool:
        """Whether a stored row is of this cell, with the config that it has now."""
        return bool(row["cell"] == self.id and row["config"] == self.config)


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
