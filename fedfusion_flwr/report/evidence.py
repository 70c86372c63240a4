# SPDX-License-Identifier: Apache-2.0
"""What a report is made of: a run directory, or a suite's folder of results."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from fedfusion_flwr.config import RunConfig
from fedfusion_flwr.errors import FedFusionError

Row = dict[str, Any]

VARIATIONS = ("hyper-parameters", "ablation")
"""Groups whose cells differ from each other in their config, not in their strategy alone."""
_ABOUT = ("python", "torch", "flwr", "commit", "machine")


class ReportError(FedFusionError, ValueError):
    """What a report is asked of is no run and no suite, or its records cannot be read."""


@dataclass(frozen=True, order=True)
class Setting:
    """What cells must have in common to be compared; all are names that the suite gave."""

    dataset: str
    model: str
    partition: str
    group: str = ""

    def __str__(self) -> str:
        named = f"{self.dataset}, {self.model}, {self.partition}"
        return f"{named} ({self.group})" if self.group else named

    @property
    def slug(self) -> str:
        """The same as part of a file name."""
        return slug(str(self))


@dataclass(frozen=True)
class Cell:
    """One finished run.

    Attributes
    ----------
    name : str
        Its id in the suite.
    setting, strategy, seed
        Where it stands in the comparison; the strategy as the suite names it.
    config : Mapping
        Every key of its run config, defaults included; ``strategy`` is there as the app names it.
    metrics : list of rows
        Its ``metrics.jsonl``, round 0 first.
    directory : Path or None
        Its run directory, where that was kept.
    digest : str
        Of the model that it ended with; empty in rows that do not tell it.
    group : str
        As the suite names it; ``setting`` leaves it out where all compared cells are of one.
    """

    name: str
    setting: Setting
    strategy: str
    seed: int
    config: Mapping[str, Any]
    metrics: list[Row]
    directory: Path | None = None
    digest: str = ""
    group: str = ""

    @property
    def algorithm(self) -> str:
        """The app's strategy behind the suite's name."""
        return str(self.config["strategy"])

    def last(self, metric: str) -> float | None:
        """A metric's value in the last round that has it, after round 0."""
        told = [row[metric] for row in self.metrics if row["round"] and _is_number(row, metric)]
        return float(told[-1]) if told else None

    def series(self, metric: str) -> np.ndarray:
        """A metric in every round, (R,), NaN where it was not measured."""
        return np.array(
            [row[metric] if _is_number(row, metric) else np.nan for row in self.metrics]
        )

    def total(self, *metrics: str) -> np.ndarray:
        """The running sum over the rounds of one or more costs, (R,); what is not told counts 0."""
        return np.asarray(sum(np.nan_to_num(self.series(metric)) for metric in metrics)).cumsum()


@dataclass(frozen=True)
class Reference:
    """One model trained on the pooled data.

    ``seed`` is of the initial model and the data, ``batch_seed`` of the order of the batches,
    ``digest`` of the trained model; empty in rows that do not tell it.
    """

    dataset: str
    model: str
    seed: int
    batch_seed: int
    config: Mapping[str, Any]
    accuracy: list[float]
    steps: float
    model_file: Path | None
    digest: str = ""


@dataclass(frozen=True)
class Evidence:
    """Everything that a report shows; ``failed`` names the runs that have no row."""

    path: Path
    cells: list[Cell]
    references: list[Reference] = field(default_factory=list)
    about: Mapping[str, list[str]] = field(default_factory=dict)
    failed: list[str] = field(default_factory=list)
    is_run: bool = False

    @property
    def compared(self) -> dict[Setting, list[Cell]]:
        """The cells of every setting in which strategies are compared, in the suite's order."""
        found: dict[Setting, list[Cell]] = {}
        for cell in self.cells:
            if cell.setting.group not in VARIATIONS:
                found.setdefault(cell.setting, []).append(cell)
        return found

    def group(self, name: str) -> list[Cell]:
        """The cells of one group."""
        return [cell for cell in self.cells if cell.setting.group == name]

    def references_for(self, setting: Setting) -> list[Reference]:
        """The centralized models of the setting's data and model."""
        wanted = (setting.dataset, setting.model)
        return [r for r in self.references if (r.dataset, r.model) == wanted]


def read_evidence(path: Path) -> Evidence:
    """Read a run directory or a suite's folder.

    Raises
    ------
    ReportError
        If it is neither, or a record is damaged.
    """
    if (path / "cells.jsonl").exists():
        return _read_suite(path)
    if (path / "metrics.jsonl").exists():
        return _read_run(path)
    raise ReportError(
        f"'{path}' is neither a run directory (no metrics.jsonl) nor a suite's folder (no "
        "cells.jsonl); name one that `flwr run` or `fedfusion compare` has written"
    )


def by_strategy(cells: Iterable[Cell]) -> dict[str, list[Cell]]:
    """Cells by strategy, in the order in which strategies first appear."""
    found: dict[str, list[Cell]] = {}
    for cell in cells:
        found.setdefault(cell.strategy, []).append(cell)
    return found


def slug(text: str) -> str:
    """Lower-case letters, digits, dots and single hyphens: fit for a file name or an anchor."""
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-.")


def first_of(names: Iterable[str], count: int = 3) -> str:
    """``a, b, c and 4 more``: distinct names for a sentence."""
    distinct = list(dict.fromkeys(names))
    more = len(distinct) - count
    return ", ".join(distinct[:count]) + (f" and {more} more" if more > 0 else "")


def _read_run(path: Path) -> Evidence:
    config_file = path / "config.json"
    if not config_file.exists():
        raise ReportError(f"'{path}' has no config.json; name a whole run directory")
    config = RunConfig.from_run_config(parsed(config_file, config_file.read_text("utf-8")))
    rows = _rows(path / "metrics.jsonl")
    setting = Setting(config.dataset, config.model, config.partition)
    told = config.to_run_config()
    cell = Cell(path.name, setting, config.strategy, config.seed, told, rows, path)
    return Evidence(path, [cell], is_run=True)


def _read_suite(path: Path) -> Evidence:
    rows = _rows(path / "cells.jsonl")
    if not rows:
        raise ReportError(f"'{path / 'cells.jsonl'}' holds no finished cell yet")
    try:
        cells = [_cell(path, row) for row in rows]
        pooled = [_reference(path, row) for row in _rows(path / "centralized.jsonl")]
        failed = [row["cell"] for row in _rows(path / "failures.jsonl")]
    except KeyError as problem:
        raise ReportError(f"a row in '{path}' lacks {problem}; make its cell anew") from problem
    compared = {c.setting.group for c in cells} - {*VARIATIONS}
    if len(compared) == 1:
        cells = [_without_group(c) if c.setting.group in compared else c for c in cells]
    about = {
        key: sorted({str(row[key]) for row in rows if row.get(key)})
        for key in _ABOUT
        if any(row.get(key) for row in rows)
    }
    return Evidence(path, cells, pooled, about, failed)


def _cell(path: Path, row: Row) -> Cell:
    directory = path / "runs" / row["cell"]
    group = row.get("group") or ""
    return Cell(
        row["cell"],
        Setting(row["dataset"], row["model"], row["partition"], group),
        row["strategy"],
        row["seed"],
        _full_config(row),
        row["metrics"],
        directory if directory.is_dir() else None,
        row.get("digest") or "",
        group,
    )


def _without_group(cell: Cell) -> Cell:
    return replace(cell, setting=replace(cell.setting, group=""))


def _reference(path: Path, row: Row) -> Reference:
    model_file = path / row["model_file"] if row.get("model_file") else None
    return Reference(
        row["dataset"],
        row["model"],
        row["seed"],
        row["batch_seed"],
        _full_config(row),
        row["accuracy"],
        row["steps"],
        model_file if model_file is not None and model_file.exists() else None,
        row.get("digest") or "",
    )


def _full_config(row: Row) -> dict[str, Any]:
    # Not checked: results of other versions can be shown, too.
    return {**RunConfig().to_run_config(), **row["config"]}


def _rows(path: Path) -> list[Row]:
    """The rows of a file; none where it does not exist."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").splitlines()
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            rows.append(parsed(path, line, number))
        except ReportError:
            # A line that was cut off by an interruption, or is just being written.
            if number < len(lines):
                raise
    return rows


def parsed(path: Path, text: str, line: int = 1) -> Row:
    """A line of a file of rows.

    Raises
    ------
    ReportError
        If it is no JSON object; the sentence names file and line.
    """
    try:
        value = json.loads(text)
    except json.JSONDecodeError as problem:
        raise ReportError(f"'{path}', line {line}, is not JSON ({problem.msg})") from problem
    if not isinstance(value, dict):
        raise ReportError(f"'{path}', line {line}, is not a JSON object")
    return value


def _is_number(row: Row, key: str) -> bool:
    return isinstance(row.get(key), int | float) and math.isfinite(row[key])
