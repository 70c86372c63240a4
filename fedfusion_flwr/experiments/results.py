# SPDX-License-Identifier: Apache-2.0
"""Results as tables: the runs of a suite's folder or a run directory, their rounds, references.

Every number of a run is that of its last round, never of its best: that one would be chosen by the
data it is measured on.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from pandas import DataFrame

from fedfusion_flwr.config import RunConfig
from fedfusion_flwr.experiments.rows import ResultsError, Row, files_of, read_all, read_rows

SETTING = ["group", "dataset", "model", "partition"]
"""What runs have in common that are compared."""
METRICS = ("global-accuracy", "personalized-accuracy", "global-loss")
ACCURACIES = METRICS[:2]
RECOVERY = ("adjusted-rand-index", "normalized-mutual-information")
COSTS = ("bytes-down", "bytes-up", "client-steps", "extra-forward-examples", "server-aggregations")
CENTRALIZED = "centralized"
VARIATIONS = ("hyper-parameters", "ablation")
"""Groups whose runs differ from each other in their config, not in their strategy alone."""
_SCORES = (*RECOVERY, "assignment-error", "occupied-groups")
_MEASURED = (*METRICS, "personalized-prior-accuracy", "personalized-loss", *_SCORES)
_DIGITS = 6
_METRIC_DIGITS = {"global-loss": 8, "personalized-loss": 8, **dict.fromkeys(_SCORES, 5)}
"""Others have all their digits: whether two strategies are equal must not depend on rounding."""
_ABOUT = ("python", "torch", "flwr", "commit", "machine")
_EVERY_ROW = ("cell", *SETTING[1:], "strategy", "seed", "config", "metrics")


class Setting(NamedTuple):
    """Names that the suite gave; ``group`` is empty where all compared runs are of one."""

    group: str
    dataset: str
    model: str
    partition: str

    def __str__(self) -> str:
        named = f"{self.dataset}, {self.model}, {self.partition}"
        return f"{named} ({self.group})" if self.group else named

    @property
    def slug(self) -> str:
        """The same as part of a file name."""
        return slug(str(self))


def slug(*parts: str) -> str:
    """Lower-case letters, digits, dots and hyphens: fit for a file name."""
    return re.sub(r"[^a-z0-9.]+", "-", "-".join(parts).lower()).strip("-.")


def first_of(names: Iterable[str], count: int = 3) -> str:
    """``a, b, c and 4 more``: distinct names for a sentence."""
    distinct = list(dict.fromkeys(names))
    more = len(distinct) - count
    return ", ".join(distinct[:count]) + (f" and {more} more" if more > 0 else "")


def mean_and_spread(mean: float, spread: float) -> str:
    """``0.912 ± 0.004``, or the mean alone if there is no spread."""
    return f"{mean:.3f}" if math.isnan(spread) else f"{mean:.3f} ± {spread:.3f}"


def rounded(value: Any, digits: int = _DIGITS) -> float | int | None:
    """A number with so many significant digits, as a row holds it; None if it is not finite."""
    if not isinstance(value, int | float) or not math.isfinite(value):
        return None
    short = float(f"{value:.{digits}g}")
    return int(short) if short.is_integer() and abs(short) < 1e15 else short


def compact(metrics: Sequence[Row]) -> dict[str, Any]:
    """What a row keeps of the lines of ``metrics.jsonl``: ``round``, and the values of each metric.

    Values are a list; a dict by round if most rounds have none; one number if all rounds but 0,
    which has none, have the same. Losses have eight significant digits, recovery scores five.
    """
    rounds = [int(row["round"]) for row in metrics]
    kept: dict[str, Any] = {"round": rounds}
    for name in (*_MEASURED, *COSTS):
        values = [rounded(row.get(name), _METRIC_DIGITS.get(name, 17)) for row in metrics]
        found = {str(r): v for r, v in zip(rounds, values, strict=True) if v is not None}
        if not found:
            continue
        if rounds[0] == 0 and values[0] is None and len(rounds) > 2 and len({*values[1:]}) == 1:
            kept[name] = values[1]
        else:
            kept[name] = found if 2 * len(found) < len(values) else values
    return kept


def _spread_out(values: Any, rounds: Sequence[int]) -> list[Any]:
    """The values of a metric in every round: the inverse of what `compact` does."""
    if isinstance(values, list):
        return values
    if isinstance(values, dict):
        return [values.get(str(number)) for number in rounds]
    return [values if number else None for number in rounds]


def rounds_table(runs: Sequence[Mapping[str, Any] | Sequence[Row]]) -> DataFrame:
    """The rounds of runs, one a line, NaN where nothing was measured.

    Beside the metrics: ``run``, the number of its run; ``bytes`` both ways and the clients'
    ``steps``, both summed up to the round.

    Parameters
    ----------
    runs : sequence of mappings or of sequences of rows
        As `compact` makes them, or the lines of ``metrics.jsonl``.
    """
    columns: dict[str, list[Any]] = {name: [] for name in ("run", "round", *_MEASURED, *COSTS)}
    for number, of in enumerate(runs):
        if isinstance(of, Mapping):
            found = {name: _spread_out(values, of["round"]) for name, values in of.items()}
        else:
            found = {name: [row.get(name) for row in of] for name in columns}
        nothing = [None] * len(found["round"])
        found["run"] = [number] * len(nothing)
        for name, column in columns.items():
            column += found.get(name, nothing)
    frame = DataFrame(columns).apply(pd.to_numeric, errors="coerce")
    frame = frame.replace([np.inf, -np.inf], np.nan)
    spent = frame[[*COSTS]].fillna(0).groupby(frame["run"]).cumsum()
    return frame.assign(bytes=spent["bytes-down"] + spent["bytes-up"], steps=spent["client-steps"])


def runs_table(rows: Sequence[Row]) -> tuple[DataFrame, DataFrame]:
    """Rows of ``cells.jsonl`` as two tables: runs and rounds.

    Returns
    -------
    runs : DataFrame
        A line a run: the row without its rounds; of the last round after 0 that has it each of
        `METRICS`; the sum of each of `COSTS`, ``bytes`` both ways, ``rounds``; ``config`` with
        every key; ``algorithm``, the app's strategy behind the suite's name.
    rounds : DataFrame
        A line a round, see `rounds_table`; ``run`` is the index of its run.

    Raises
    ------
    ResultsError
        If a row lacks what every row has.
    """
    for key in (key for row in rows for key in _EVERY_ROW if key not in row):
        raise ResultsError(f"a row lacks '{key}'; run its cell again")
    rounds = rounds_table([row["metrics"] for row in rows])
    runs = DataFrame([{k: v for k, v in row.items() if k != "metrics"} for row in rows])
    runs["group"] = runs["group"].fillna("") if "group" in runs else ""
    # Not checked, so that results of other versions can be shown.
    runs["config"] = [{**RunConfig().to_run_config(), **row["config"]} for row in rows]
    runs["algorithm"] = [str(config["strategy"]) for config in runs["config"]]
    by_run = rounds.groupby("run")
    last = rounds[rounds["round"] > 0].groupby("run")[[*METRICS]].last()
    runs[[*METRICS]] = last.reindex(runs.index)
    runs[[*COSTS]] = by_run[[*COSTS]].sum()
    runs["bytes"] = runs["bytes-down"] + runs["bytes-up"]
    runs["rounds"] = by_run["round"].max()
    return runs, rounds


@dataclass(frozen=True)
class Results:
    """Everything that a report shows.

    Attributes
    ----------
    path : Path
        The suite's folder, or the run directory.
    runs, rounds : DataFrame
        See `runs_table`.
    references : DataFrame
        A line a model that was trained on the pooled data: ``dataset``, ``model``, ``seed``,
        ``batch_seed``, ``digest``, ``bias`` and ``accuracy``, the last.
    about : Mapping[str, list[str]]
        Versions, commits and machines that made the runs.
    failed : list[str]
        Runs without a row.
    is_run : bool
        Whether it is one run directory.
    """

    path: Path
    runs: DataFrame
    rounds: DataFrame
    references: DataFrame
    about: Mapping[str, list[str]] = field(default_factory=dict)
    failed: list[str] = field(default_factory=list)
    is_run: bool = False

    @property
    def compared(self) -> dict[Setting, DataFrame]:
        """The runs of every setting in which strategies are compared, in the order of the rows."""
        runs = self.runs[~self.runs["group"].isin(VARIATIONS)]
        one = runs["group"].nunique() == 1
        return {
            Setting("" if one else names[0], *names[1:]): of
            for names, of in runs.groupby(SETTING, sort=False)
        }

    def rounds_of(self, runs: DataFrame) -> DataFrame:
        """The rounds of some runs, with ``strategy``."""
        return self.rounds.join(runs["strategy"], on="run", how="inner")

    def references_for(self, setting: Setting) -> DataFrame:
        """The references of the setting's data set and model.

        A model that two rows tell of, as in folders that were put together, counts once.
        """
        found = self.references
        found = found[(found["dataset"] == setting.dataset) & (found["model"] == setting.model)]
        return found[~found.duplicated("digest") | (found["digest"] == "")]


def read_results(path: Path) -> Results:
    """Read a run directory or a suite's folder.

    Raises
    ------
    ResultsError
        If it is neither, or a record is damaged.
    """
    is_run = not any(file.exists() for file in files_of(path, "cells"))
    if is_run and not (path / "metrics.jsonl").exists():
        raise ResultsError(
            f"'{path}' is neither a run directory (no metrics.jsonl) nor a suite's folder (no "
            "cells.jsonl); name one that `flwr run` or `fedfusion compare` has written"
        )
    rows = [_row_of_run(path)] if is_run else read_all(path, "cells")
    if not rows:
        raise ResultsError(f"'{path / 'cells.jsonl'}' holds no finished cell yet")
    names = ["dataset", "model", "seed", "batch_seed", "digest", "bias", "accuracy"]
    pooled = [] if is_run else read_all(path, CENTRALIZED)
    references = DataFrame(
        [{"digest": "", **row, "accuracy": (row["accuracy"] or [None])[-1]} for row in pooled],
    ).reindex(columns=names)
    about = {key: sorted({str(row[key]) for row in rows if row.get(key)}) for key in _ABOUT}
    return Results(
        path,
        *runs_table(rows),
        references,
        {key: values for key, values in about.items() if values},
        [str(row.get("cell")) for row in read_rows(path / "failures.jsonl")],
        is_run,
    )


def _row_of_run(path: Path) -> Row:
    """A run directory as a suite's row."""
    file = path / "config.json"
    if not file.exists():
        raise ResultsError(f"'{path}' has no config.json; name a whole run directory")
    try:
        config = RunConfig.from_run_config(json.loads(file.read_text(encoding="utf-8")))
    except (json.JSONDecodeError, UnicodeDecodeError) as problem:
        raise ResultsError(f"'{file}' is damaged ({problem})") from problem
    factors = {key: getattr(config, key) for key in (*SETTING[1:], "strategy", "seed")}
    metrics = read_rows(path / "metrics.jsonl")
    return {"cell": path.name, **factors, "config": config.to_run_config(), "metrics": metrics}
