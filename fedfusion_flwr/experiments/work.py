# SPDX-License-Identifier: Apache-2.0
"""The work of a suite: federated runs, and references trained on the pooled data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
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
_FACTORS = (
    *("strategy", "dataset", "model", "partition", "seed", "batch_seed", "group", "candidate"),
    "config",
)


@dataclass(frozen=True)
class Machine:
    """Where and how jobs run.

    Attributes
    ----------
    folder : Path
        Of the results.
    engine : str
        ``simulation`` or ``in-process``, see `app.local.run_locally`.
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


@dataclass(frozen=True)
class Grid:
    """All combinations of some names, each run with every seed."""

    name: str
    strategies: Sequence[str]
    datasets: Sequence[str]
    models: Sequence[str]
    partitions: Sequence[str]
    seeds: Sequence[int]
    config: Overrides = field(default_factory=dict)
    seconds: float = 0.0
    tuned: bool = True
    served: bool = False


@dataclass(frozen=True)
class Tuning:
    """Candidates of every strategy, tried in one grid, and the metric that decides for each."""

    grid: Grid
    candidates: dict[str, list[Overrides]]
    metrics: dict[str, str]


@dataclass(frozen=True, kw_only=True)
class Work:
    """What makes one row: a run of a suite, or a model trained on the pooled data.

    Attributes
    ----------
    group, dataset, model : str
        Names in the suite; the group of a reference is `CENTRALIZED`.
    strategy, partition : str
        The same; empty for a reference.
    seed : int
        Of the run or the model.
    config : dict[str, Value]
        Every run-config key that differs from the app's defaults or that the suite names.
    seconds : float
        What it takes, as the suite says; 0 where it does not.
    candidate : int or None
        Tuning: which of the strategy's candidates.
    batch_seed : int or None
        Of a reference: of the order of its batches.
    first : bool
        Whether its seed is its group's first, whose model and inference pictures show.
    served : bool
        Whether it scores what each client is served, see `served.measure_served`.
    """

    group: str
    dataset: str
    model: str
    seed: int
    config: Overrides
    strategy: str = ""
    partition: str = ""
    candidate: int | None = None
    batch_seed: int | None = None
    seconds: float = 0.0
    first: bool = False
    served: bool = False

    @property
    def kind(self) -> str:
        """Of its row. Those of the tuning are apart: they are in no comparison."""
        return self.group if self.group in (TUNE, CENTRALIZED) else CELLS

    @property
    def is_compared(self) -> bool:
        """Whether strategies are compared in its group, and with centralized training."""
        return self.group not in (TUNE, CENTRALIZED, *VARIATIONS)

    @property
    def id(self) -> str:
        """A file name made of the factors, the same in every session."""
        if self.kind == CENTRALIZED:
            return slug(self.dataset, self.model, f"s{self.seed}", f"b{self.batch_seed}")
        which = [] if self.candidate is None else [f"c{self.candidate}"]
        names = (self.group, self.dataset, self.model, self.partition, self.strategy)
        return slug(*names, *which, f"s{self.seed}")

    @property
    def model_file(self) -> str:
        """Where a reference's model is saved, in the folder of the results."""
        return f"{MODELS_FOLDER}/{self.id}.safetensors"

    def factors(self) -> Row:
        """The first columns of its row; ``cell`` is the id."""
        values = {name: getattr(self, name) for name in _FACTORS}
        return {"cell": self.id} | {name: v for name, v in values.items() if v not in (None, "")}

    def has_row(self, row: Row) -> bool:
        """Whether a stored row is of this work, with the config that it has now."""
        return bool(row["cell"] == self.id and row["config"] == self.config)

    def serves(self, other: Work) -> bool:
        """Whether this is a reference with the data set and model of other work."""
        same = (self.dataset, self.model) == (other.dataset, other.model)
        return same and self.kind == CENTRALIZED

    def arguments(self, machine: Machine, references: Sequence[Row] = ()) -> dict[str, Any]:
        """Of `federated.run_cell` or `centralized.train_centralized`.

        The data root belongs to this machine and stands in no row. ``references`` are what the
        model is compared with, see `bias.measure_bias`.
        """
        root = (machine.data_roots or {}).get(self.dataset)
        config = self.config if root is None else {**self.config, "data-root": root}
        folder = machine.folder.resolve()
        if self.kind == CENTRALIZED:
            return {
                "config": config,
                "folder": str(folder),
                "model_file": self.model_file,
                "batch_seed": self.batch_seed,
                "references": list(references),
            }
        drawn = folder / INFERRED_FOLDER / f"{self.id}.npz"
        output = {"output-dir": str(folder / RUNS_FOLDER / self.id)}
        return {
            # Without checkpoints: a job starts from the beginning.
            "config": {"checkpoint-every": 0, **config, **output},
            "engine": machine.engine,
            "cpus": machine.cpus,
            "gpus": machine.gpus,
            "references": list(references),
            "drawn": str(drawn) if self.first and self.is_compared else None,
            "served": self.served,
        }

    def job(self, machine: Machine, references: Sequence[Row] = ()) -> Job:
        """The work as a process with a directory of its own."""
        is_run = self.kind != CENTRALIZED
        kind, name = ("cell", self.id) if is_run else (CENTRALIZED, f"{CENTRALIZED}-{self.id}")
        arguments = {"kind": kind, **self.arguments(machine, references)}
        return Job(self.id, arguments, machine.folder / RUNS_FOLDER / name)
