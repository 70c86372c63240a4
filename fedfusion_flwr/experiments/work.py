# SPDX-License-Identifier: Apache-2.0
"""The pieces of work of a suite: federated cells, and references trained on the pooled data."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from fedfusion_flwr.config import Value
from fedfusion_flwr.experiments.cell import SIMULATION
from fedfusion_flwr.experiments.grid import TUNE, Cell, Overrides, merged, slug
from fedfusion_flwr.experiments.processes import Job
from fedfusion_flwr.experiments.rows import Row
from fedfusion_flwr.experiments.suite import Suite

CENTRALIZED = "centralized"
MODELS_FOLDER = "models"


@dataclass(frozen=True)
class Machine:
    """Where and how jobs run.

    Attributes
    ----------
    folder : Path
        Of the results.
    engine : str
        One of `cell.ENGINES`.
    cpus : int
        simulation: CPUs of each job.
    gpus : float
        simulation: share of a GPU for each client.
    data_roots : Mapping[str, str]
        Folders of data sets, by their names in the suite.
    """

    folder: Path
    engine: str = SIMULATION
    cpus: int = 1
    gpus: float = 0.0
    data_roots: Mapping[str, str] | None = None

    def local(self, dataset: str) -> dict[str, Value]:
        """Keys that belong to this machine: no row tells them."""
        root = (self.data_roots or {}).get(dataset)
        return {} if root is None else {"data-root": root}


class Work(Protocol):
    """One piece of work, and where its row goes."""

    @property
    def id(self) -> str:
        """The same in every session."""

    @property
    def group(self) -> str:
        """What else takes about as long."""

    @property
    def seconds(self) -> float:
        """What the suite says that it takes; 0 where it does not."""

    @property
    def file(self) -> str:
        """The file of its rows."""

    def factors(self) -> Row:
        """The first columns of its row."""

    def is_row(self, row: Row) -> bool:
        """Whether a stored row is of this work, with the config that it has now."""

    def job(self, machine: Machine) -> Job:
        """The job that makes its row."""


@dataclass(frozen=True)
class CellWork:
    """A federated run."""

    cell: Cell

    @property
    def id(self) -> str:
        """The cell's."""
        return self.cell.id

    @property
    def group(self) -> str:
        """The cell's."""
        return self.cell.group

    @property
    def seconds(self) -> float:
        """The cell's."""
        return self.cell.seconds

    @property
    def file(self) -> str:
        """Those of the tuning are apart: nothing is to be compared in them."""
        return "tune.jsonl" if self.cell.group == TUNE else "cells.jsonl"

    def factors(self) -> Row:
        """The cell's."""
        return self.cell.factors()

    def is_row(self, row: Row) -> bool:
        """The cell's."""
        return self.cell.is_row(row)

    def job(self, machine: Machine) -> Job:
        """A run in a directory of its own; checkpoints are of no use in one that starts anew."""
        folder = machine.folder / "runs" / self.id
        config = {
            "checkpoint-every": 0,
            **self.cell.config,
            **machine.local(self.cell.dataset),
            "output-dir": str(folder.resolve()),
        }
        arguments = {"engine": machine.engine, "cpus": machine.cpus, "gpus": machine.gpus}
        return Job(self.id, {"kind": "cell", "config": config, **arguments}, folder)


@dataclass(frozen=True)
class Reference:
    """A model trained on the pooled data, for all runs with its data set and model."""

    dataset: str
    model: str
    seed: int
    batch_seed: int
    config: Overrides
    seconds: float = 0.0
    steps: int | None = None

    group = CENTRALIZED
    file = "centralized.jsonl"

    @property
    def id(self) -> str:
        """Made of the factors."""
        return slug(self.dataset, self.model, f"s{self.seed}", f"b{self.batch_seed}")

    def factors(self) -> Row:
        """The first columns of the row; ``cell`` is the id."""
        return {
            "cell": self.id,
            "dataset": self.dataset,
            "model": self.model,
            "seed": self.seed,
            "batch_seed": self.batch_seed,
            "config": self.config,
        }

    def is_row(self, row: Row) -> bool:
        """By id and config."""
        return bool(row["cell"] == self.id and row["config"] == self.config)

    def arguments(self, machine: Machine) -> dict[str, Any]:
        """Of `train_centralized`."""
        return {
            "config": {**self.config, **machine.local(self.dataset)},
            "folder": str(machine.folder.resolve()),
            "model_file": f"{MODELS_FOLDER}/{self.id}.safetensors",
            "batch_seed": self.batch_seed,
            "steps": self.steps,
        }

    def job(self, machine: Machine) -> Job:
        """The training, which takes no engine."""
        folder = machine.folder / "runs" / f"{CENTRALIZED}-{self.id}"
        return Job(self.id, {"kind": CENTRALIZED, **self.arguments(machine)}, folder)


def references(suite: Suite) -> list[Reference]:
    """What the suite wants trained on the pooled data; of several groups the first counts."""
    found: dict[str, Reference] = {}
    for grid in suite.centralized:
        for dataset, model, seed, batch_seed in itertools.product(
            grid.datasets, grid.models, grid.seeds, suite.batch_seeds
        ):
            config = merged(
                suite.common,
                grid.config,
                suite.named("datasets", dataset),
                suite.named("models", model),
                suite.named("partitions", grid.partitions[0]),
                {"seed": seed},
            )
            reference = Reference(dataset, model, seed, batch_seed, config, grid.seconds)
            found.setdefault(reference.id, reference)
    return list(found.values())
