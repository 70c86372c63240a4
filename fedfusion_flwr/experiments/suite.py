# SPDX-License-Identifier: Apache-2.0
"""Suites: TOML files that say which runs are compared."""

from __future__ import annotations

import difflib
import itertools
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any, cast

from fedfusion_flwr.errors import FedFusionError
from fedfusion_flwr.experiments.grid import TUNE, Cell, Overrides, merged, with_equal_steps

AXES = {
    "strategies": "strategy",
    "datasets": "dataset",
    "models": "model",
    "partitions": "partition",
}
"""Tables of a suite, and the run-config key that a name stands for where there is no table."""
_SUITE = {"name", "keep", "common", "groups", "tune", "centralized", *AXES}
_GROUP = {"name", "seeds", "seconds", "config", "tuned", *AXES}
_TUNE = {"seeds", "seconds", "config", "candidates", "metric", *AXES} - {"strategies"}
_CENTRALIZED = {"groups", "seeds", "batch-seeds", "seconds", "config"}


class SuiteError(FedFusionError, ValueError):
    """A suite that does not exist or makes no sense."""


@dataclass(frozen=True)
class Grid:
    """All combinations of some names, each run with every seed."""

    name: str
    strategies: Sequence[str]
    datasets: Sequence[str]
    models: Sequence[str]
    partitions: Sequence[str]
    seeds: Sequence[int]
    config: Overrides
    seconds: float = 0.0
    tuned: bool = True


@dataclass(frozen=True)
class Tuning:
    """Candidates of every strategy, tried in one grid; ``metric`` decides, by strategy or for all.

    ``metric`` is that of the last round; a loss is best small.
    """

    grid: Grid
    candidates: dict[str, list[Overrides]]
    metrics: dict[str, str]


@dataclass(frozen=True)
class Suite:
    """A suite, checked: every cell's config is one that a run accepts.

    Attributes
    ----------
    name, text : str
        Its name and the file as it is.
    keep : list[str] or None
        Files of a run directory that stay after its row is written; None keeps all.
    grids : list[Grid]
        The groups; several may share a name.
    tuning : Tuning or None
        If given, its winners' keys are part of the strategies.
    centralized : Grid or None
        Data sets and models that are trained on the pooled data, too; seeds are of the model.
    batch_seeds : list[int]
        Orders of the batches of each of those.
    """

    name: str
    text: str
    common: Overrides
    tables: dict[str, dict[str, Overrides]]
    grids: list[Grid]
    keep: list[str] | None = None
    tuning: Tuning | None = None
    centralized: list[Grid] = field(default_factory=list)
    batch_seeds: list[int] = field(default_factory=list)

    def cells(self, winners: Mapping[str, Overrides]) -> list[Cell]:
        """The cells of all groups; ``winners`` are the tuned keys of strategies."""
        found: dict[str, Cell] = {}
        for grid in self.grids:
            for cell in self._expanded(grid, winners if grid.tuned else {}):
                if found.setdefault(cell.id, cell).config != cell.config:
                    raise SuiteError(
                        f"suite '{self.name}': two cells are called '{cell.id}' and differ in "
                        "their config; give one of their groups or names another name"
                    )
        return list(found.values())

    def tune_cells(self) -> list[Cell]:
        """The cells of the tuning."""
        if self.tuning is None:
            return []
        return [
            cell
            for strategy, candidates in self.tuning.candidates.items()
            for number, candidate in enumerate(candidates)
            for cell in self._expanded(self.tuning.grid, {strategy: candidate}, strategy, number)
        ]

    def check_data_roots(self, names: Iterable[str]) -> None:
        """Refuse the name of a data set that the suite does not have."""
        grids = [*self.grids, *([self.tuning.grid] if self.tuning else [])]
        known = {dataset for grid in grids for dataset in grid.datasets}
        for name in names:
            if name not in known:
                raise SuiteError(
                    f"suite '{self.name}' has no data set '{name}'; "
                    f"it has {', '.join(sorted(known))}"
                )

    def _expanded(
        self,
        grid: Grid,
        tuned: Mapping[str, Overrides],
        only: str | None = None,
        candidate: int | None = None,
    ) -> Iterator[Cell]:
        strategies = grid.strategies if only is None else [only]
        for dataset, model, partition, strategy, seed in itertools.product(
            grid.datasets, grid.models, grid.partitions, strategies, grid.seeds
        ):
            root, *variants = self._line(strategy)
            config = merged(
                self.common,
                grid.config,
                self.named("datasets", dataset),
                self.named("models", model),
                self.named("partitions", partition),
                self.named("strategies", root),
                tuned.get(root, {}),
                *(self.tables["strategies"][variant] for variant in variants),
                {"seed": seed},
            )
            config.pop("based-on", None)
            try:
                config = with_equal_steps(config)
            except FedFusionError as problem:
                raise SuiteError(
                    f"suite '{self.name}', group '{grid.name}', strategy '{strategy}': {problem}"
                ) from problem
            names = (grid.name, strategy, dataset, model, partition)
            yield Cell(*names, seed, config, grid.seconds, candidate)

    def named(self, axis: str, name: str) -> Overrides:
        """The keys that a name of an axis stands for."""
        return merged({AXES[axis]: name}, self.tables[axis].get(name, {}))

    def _line(self, strategy: str) -> list[str]:
        """What a strategy is based on, what that is based on, ...; the root first, itself last."""
        line = [strategy]
        while base := self.tables["strategies"].get(line[0], {}).get("based-on"):
            if base in line:
                raise SuiteError(
                    f"suite '{self.name}': strategy '{strategy}' is based on itself; end the "
                    "chain of based-on with a strategy of its own"
                )
            line.insert(0, str(base))
        return line


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
    """Parse and check a suite."""
    try:
        told = tomllib.loads(text)
    except tomllib.TOMLDecodeError as problem:
        raise SuiteError(f"suite '{name}' is not TOML: {problem}") from problem
    name = str(told.get("name", name))
    _only(told, _SUITE, f"suite '{name}'")
    tables = {axis: dict(told.get(axis, {})) for axis in AXES}
    groups = told.get("groups", [])
    if not groups:
        raise SuiteError(f"suite '{name}' has no [[groups]]")
    grids = [_grid(group, f"suite '{name}', group '{group.get('name')}'") for group in groups]
    suite = Suite(
        name,
        text,
        dict(told.get("common", {})),
        tables,
        grids,
        told.get("keep"),
        _tuning(told.get("tune"), name),
        *_centralized(told.get("centralized"), grids, name),
    )
    # Whatever is wrong shows now and not after hours.
    suite.cells({})
    suite.tune_cells()
    return suite


def _grid(group: dict[str, Any], where: str, allowed: set[str] = _GROUP) -> Grid:
    _only(group, allowed, where)
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
    )


def _tuning(told: dict[str, Any] | None, name: str) -> Tuning | None:
    if told is None:
        return None
    where = f"suite '{name}', tune"
    candidates = cast(dict[str, list[Overrides]], told.get("candidates", {}))
    sizes = {len(tried) for tried in candidates.values()}
    if len(sizes) != 1 or 0 in sizes:
        raise SuiteError(
            f"{where}: every strategy must have as many candidates as the others, got "
            + (", ".join(f"{len(c)} for {s}" for s, c in candidates.items()) or "none")
        )
    metric = told.get("metric", {})
    metrics = {s: str(metric.get(s, "global-accuracy")) for s in candidates}
    return Tuning(_grid(told, where, _TUNE), candidates, metrics)


def _centralized(
    told: dict[str, Any] | None, grids: list[Grid], name: str
) -> tuple[list[Grid], list[int]]:
    """Of the groups named: their data sets, models and rounds, with seeds of their own.

    Of the partitions the first, which says how many gradient steps there are.
    """
    if told is None:
        return [], []
    where = f"suite '{name}', centralized"
    _only(told, _CENTRALIZED, where)
    wanted = told.get("groups", [grid.name for grid in grids])
    chosen = [grid for grid in grids if grid.name in wanted]
    references = [
        Grid(
            grid.name,
            [],
            grid.datasets,
            grid.models,
            grid.partitions[:1],
            told.get("seeds", [0]),
            merged(grid.config, told.get("config", {})),
            float(told.get("seconds", 0)),
        )
        for grid in chosen
    ]
    return references, told.get("batch-seeds", [0])


def _only(told: Mapping[str, Any], allowed: set[str], where: str) -> None:
    for key in told:
        if key not in allowed:
            close = difflib.get_close_matches(key, allowed, n=1)
            hint = f"did you mean '{close[0]}'?" if close else f"known are {sorted(allowed)}"
            raise SuiteError(f"{where}: unknown key '{key}'; {hint}")
