# SPDX-License-Identifier: Apache-2.0
"""The work of a suite: federated cells, and references trained on the pooled data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedfusion_flwr.config import Value
from fedfusion_flwr.experiments.inferred import FOLDER as INFERRED_FOLDER
from fedfusion_flwr.experiments.jobs import Job
from fedfusion_flwr.experiments.results import CENTRALIZED, VARIATIONS, slug
from fedfusion_flwr.experiments.rows import Row

Overrides = dict[str, Value]
CELLS, TUNE = "cells", "tune"
"""Kinds of rows, with `CENTRALIZED`; the last two are groups as well."""
RUNS_FOLDER, MODELS_FOLDER = "runs", "models"


@dataclass(frozen=True)
class Machine:
    """Where and how jobs run.

    Attributes
    ----------
    folder : Path
        Of the results.
    engine : str
        One of `federated.ENGINES`.
    cpus : int
        simulation: CPUs of each job.
    gpus : float
        simulation: share of a GPU for each client.
    data_roots : Mapping[str, str]
        Folders of data sets, by their names in the suite.
    """

    folder: Path
    engine: str = "simulation"
    cpus: int = 1
    gpus: float = 0.0
    data_roots: Mapping[str, str] | None = None

    def local(self, dataset: str) -> dict[str, Value]:
        """Keys that belong to this machine and stand in no row."""
        root = (self.data_roots or {}).get(dataset)
        return {} if root is None else {"data-root": root}


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
    first : bool
        Whether its seed is its group's first, whose model and inference pictures show.
    served : bool
        Whether it scores what each client is served, see `served.measure_served`.
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
    first: bool = False
    served: bool = False

    @property
    def kind(self) -> str:
        """Of its row. Those of the tuning are apart: they are in no comparison."""
        return TUNE if self.group == TUNE else CELLS

    @property
    def is_compared(self) -> bool:
        """Whether strategies are compared in its group, and with centralized training."""
        return self.group not in (TUNE, *VARIATIONS)

    @property
    def id(self) -> str:
        """A file name made of the factors, the same in every session."""
        which = [] if self.candidate is None else [f"c{self.candidate}"]
        parts = (self.group, self.dataset, self.model, self.partition, self.strategy, *which)
        return slug(*parts, f"s{self.seed}")

    def factors(self) -> Row:
        """The first columns of the cell's row."""
        names = ("strategy", "dataset", "model", "partition", "seed", "group")
        row = {"cell": self.id} | {name: getattr(self, name) for name in names}
        tried = {} if self.candidate is None else {"candidate": self.candidate}
        return row | tried | {"config": self.config}

    def job(self, machine: Machine, references: Sequence[Row] = ()) -> Job:
        """A run in a directory of its own, without checkpoints: a job starts from the beginning.

        ``references`` are what it is compared with, see `bias.measure_bias`.
        """
        folder = machine.folder / RUNS_FOLDER / self.id
        config = {
            "checkpoint-every": 0,
            **self.config,
            **machine.local(self.dataset),
            "output-dir": str(folder.resolve()),
        }
        inferred = machine.folder.resolve() / INFERRED_FOLDER / f"{self.id}.npz"
        arguments = {
            "kind": "cell",
            "config": config,
            "engine": machine.engine,
            "cpus": machine.cpus,
            "gpus": machine.gpus,
            "references": list(references),
            "drawn": str(inferred) if self.first and self.is_compared else None,
            "served": self.served,
        }
        return Job(self.id, arguments, folder)


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
    kind = CENTRALIZED
    is_compared = False

    @property
    def id(self) -> str:
        """A file name made of the factors."""
        return slug(self.dataset, self.model, f"s{self.seed}", f"b{self.batch_seed}")

    def factors(self) -> Row:
        """The first columns of the row; ``cell`` is the id."""
        names = ("dataset", "model", "seed", "batch_seed", "config")
        return {"cell": self.id} | {name: getattr(self, name) for name in names}

    def serves(self, one: Cell | Reference) -> bool:
        """Whether it has the data set and model of other work."""
        return (self.dataset, self.model) == (one.dataset, one.model)

    def model_file(self, folder: Path) -> Path:
        """Where its model is saved."""
        return folder / MODELS_FOLDER / f"{self.id}.safetensors"

    def arguments(self, machine: Machine, references: Sequence[Row] = ()) -> dict[str, Any]:
        """Of `train_centralized`."""
        return {
            "config": {**self.config, **machine.local(self.dataset)},
            "folder": str(machine.folder.resolve()),
            "model_file": f"{MODELS_FOLDER}/{self.id}.safetensors",
            "batch_seed": self.batch_seed,
            "steps": self.steps,
            "references": list(references),
        }

    def job(self, machine: Machine, references: Sequence[Row] = ()) -> Job:
        """The training, which takes no engine."""
        folder = machine.folder / RUNS_FOLDER / f"{CENTRALIZED}-{self.id}"
        return Job(self.id, {"kind": CENTRALIZED, **self.arguments(machine, references)}, folder)


Work = Cell | Reference
"""What makes one row."""


def is_row_of(row: Row, one: Work) -> bool:
    """Whether a stored row is of this work, with the config that it has now."""
    return bool(row["cell"] == one.id and row["config"] == one.config)
