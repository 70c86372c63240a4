# SPDX-License-Identifier: Apache-2.0
"""Suites as TOML files: found, read and checked."""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any, cast

from fedfusion_flwr.config import BEST_METRICS
from fedfusion_flwr.experiments.results import CENTRALIZED
from fedfusion_flwr.experiments.suite import AXES, Grid, Suite, SuiteError, Tuning, merged
from fedfusion_flwr.experiments.work import TUNE, Overrides

_SUITE = {"name", "keep", "common", "groups", "tune", "centralized", *AXES}
_GROUP = {"name", "seeds", "seconds", "config", "tuned", "served", *AXES}
_TUNE = {"seeds", "seconds", "config", "candidates", "metric", *AXES} - {"strategies"}
_CENTRALIZED = {"groups", "seeds", "batch-seeds", "seconds", "config"}


def load_suite(name: str) -> Suite:
    """A suite that comes with the package, by name, or one's own, by path.

    Raises
    ------
    SuiteError
        One sentence: what is wrong with which part.
    """
    shipped = files("fedfusion_flwr.experiments") / "suites" / f"{name}.toml"
    if name.isidentifier() and shipped.is_file():
        return parse_suite(shipped.read_text(encoding="utf-8"))
    path = Path(name)
    if not path.is_file():
        known = sorted(
            entry.name.removesuffix(".toml")
            for entry in (files("fedfusion_flwr.experiments") / "suites").iterdir()
            if entry.name.endswith(".toml")
        )
        raise SuiteError(
            f"there is no suite '{name}': use one of {', '.join(known)}, or the path of a .toml "
            "file of your own"
        )
    return parse_suite(path.read_text(encoding="utf-8"), path.stem)


def parse_suite(text: str, name: str = "") -> Suite:
    """Parse and check a suite.

    Raises
    ------
    SuiteError
        One sentence: what is wrong with which part.
    """
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as problem:
        raise SuiteError(f"suite '{name}' is not TOML: {problem}") from problem
    try:
        return _checked(table, text, name)
    except (TypeError, AttributeError, ValueError) as problem:
        if isinstance(problem, SuiteError):
            raise
        # A number for a table, a string for a list, ...: the parts are too many to name them all.
        raise SuiteError(
            f"suite '{name}' is not laid out as docs/compare.md says: {problem}"
        ) from problem


def _checked(table: dict[str, Any], text: str, name: str) -> Suite:
    name = str(table.get("name", name))
    _only(table, _SUITE, f"suite '{name}'")
    tables = {axis: dict(table.get(axis, {})) for axis in AXES}
    groups = table.get("groups", [])
    if not groups:
        raise SuiteError(f"suite '{name}' has no [[groups]]")
    grids = [_grid(group, f"suite '{name}', group '{group.get('name')}'") for group in groups]
    suite = Suite(
        name,
        text,
        dict(table.get("common", {})),
        tables,
        grids,
        table.get("keep"),
        _tuning(table.get("tune"), name),
        *_centralized(table.get("centralized"), grids, name),
    )
    # What is wrong shows now and not after hours.
    suite.cells({})
    suite.tune_cells()
    return suite


def _grid(group: dict[str, Any], where: str, allowed: set[str] = _GROUP) -> Grid:
    _only(group, allowed, where)
    if group.get("name") in (TUNE, CENTRALIZED):
        raise SuiteError(f"{where}: that name is taken; choose another")
    for axis in (*(AXES.keys() & allowed), "seeds"):
        if not isinstance(group.get(axis), list) or not group[axis]:
            raise SuiteError(f"{where}: {axis} must be a list of one or more")
    return Grid(
        str(group.get("name", TUNE)),
        group.get("strategies", []),
        group["datasets"],
        group["models"],
        group["partitions"],
        group["seeds"],
        dict(group.get("config", {})),
        float(group.get("seconds", 0)),
        bool(group.get("tuned", True)),
        bool(group.get("served", False)),
    )


def _tuning(table: dict[str, Any] | None, name: str) -> Tuning | None:
    if table is None:
        return None
    where = f"suite '{name}', tune"
    candidates = cast(dict[str, list[Overrides]], table.get("candidates", {}))
    sizes = {len(tried) for tried in candidates.values()}
    if len(sizes) != 1 or 0 in sizes:
        raise SuiteError(
            f"{where}: every strategy must have as many candidates as the others, got "
            + (", ".join(f"{len(c)} for {s}" for s, c in candidates.items()) or "none")
        )
    metrics = dict.fromkeys(candidates, "global-accuracy") | table.get("metric", {})
    _only(metrics, set(candidates), f"{where}, metric")
    for metric in metrics.values():
        if metric not in BEST_METRICS:
            raise SuiteError(f"{where}: metric '{metric}' is none of {', '.join(BEST_METRICS)}")
    return Tuning(_grid(table, where, _TUNE), candidates, metrics)


def _centralized(
    table: dict[str, Any] | None, grids: list[Grid], name: str
) -> tuple[list[Grid], list[int]]:
    """The data sets, models and rounds of the groups named; their seeds if no others are given.

    Only the first partition: it says how many gradient steps there are.
    """
    if table is None:
        return [], []
    where = f"suite '{name}', centralized"
    _only(table, _CENTRALIZED, where)
    known = [grid.name for grid in grids]
    wanted = table.get("groups", known)
    for group in wanted:
        if group not in known:
            raise SuiteError(f"{where}: there is no group '{group}'; there are {known}")
    chosen = [grid for grid in grids if grid.name in wanted]
    references = [
        Grid(
            grid.name,
            [],
            grid.datasets,
            grid.models,
            grid.partitions[:1],
            table.get("seeds", grid.seeds),
            merged(grid.config, table.get("config", {})),
            float(table.get("seconds", 0)),
        )
        for grid in chosen
    ]
    return references, table.get("batch-seeds", [0])


def _only(table: Mapping[str, Any], allowed: set[str], where: str) -> None:
    for key in table:
        if key not in allowed:
            close = difflib.get_close_matches(key, allowed, n=1)
            hint = f"did you mean '{close[0]}'?" if close else f"known are {sorted(allowed)}"
            raise SuiteError(f"{where}: unknown key '{key}'; {hint}")
