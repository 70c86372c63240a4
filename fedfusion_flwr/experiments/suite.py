# SPDX-License-Identifier: Apache-2.0
"""Suites: which runs are compared. TOML files, found, read and checked."""

from __future__ import annotations

import difflib
import itertools
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

from fedfusion_flwr.config import BEST_METRICS, RunConfig
from fedfusion_flwr.errors import FedFusionError
from fedfusion_flwr.experiments.results import CENTRALIZED
from fedfusion_flwr.experiments.work import TUNE, Grid, Overrides, Tuning, Work
from fedfusion_flwr.strategies.registry import strategy_class

AXES = ("strategies", "datasets", "models", "partitions")
"""Tables of a suite. A name without a table is the value of the run-config key."""
_SUITE = {"name", "keep", "common", "groups", "tune", "centralized", *AXES}
_GROUP = {"name", "seeds", "seconds", "config", "tuned", "served", *AXES}
_TUNE = {"seeds", "seconds", "config", "candidates", "metric", *AXES} - {"strategies"}
_CENTRALIZED = {"groups", "seeds", "batch-seeds", "seconds", "config"}


class SuiteError(FedFusionError, ValueError):
    """A suite that does not exist or cannot be run."""


@dataclass(frozen=True)
class Suite:
    """A suite, checked: every run's config is one that a run accepts.

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
    centralized : list[Grid]
        Data sets and models that are trained on the pooled data, too; seeds are of the model.
    batch_seeds : list[int]
        Of the order of the batches; a reference for each.
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

    def cells(self, winners: Mapping[str, Overrides]) -> list[Work]:
        """The runs of all groups; ``winners`` are the tuned keys of strategies."""
        found: dict[str, Work] = {}
        for grid in self.grids:
            for cell in self._expanded(grid, winners if grid.tuned else {}):
                if found.setdefault(cell.id, cell).config != cell.config:
                    raise SuiteError(
                        f"suite '{self.name}': two cells are called '{cell.id}' and differ in "
                        "their config; give one of their groups or names another name"
                    )
        return list(found.values())

    def tune_cells(self) -> list[Work]:
        """The runs of the tuning."""
        if self.tuning is None:
            return []
        return [
            replace(cell, candidate=number)
            for strategy, candidates in self.tuning.candidates.items()
            for number, candidate in enumerate(candidates)
            for cell in self._expanded(
                replace(self.tuning.grid, strategies=[strategy]), {strategy: candidate}
            )
        ]

    def references(self) -> list[Work]:
        """What is trained on the pooled data, too; if several groups want it, the first counts.

        The group's first partition says how many gradient steps the reference takes.
        """
        found: dict[str, Work] = {}
        for work in (work for grid in self.centralized for work in self._expanded(grid, {})):
            for batch_seed in self.batch_seeds:
                reference = replace(work, partition="", batch_seed=batch_seed, first=False)
                found.setdefault(reference.id, reference)
        return list(found.values())

    def check_data_roots(self, names: Iterable[str]) -> None:
        """Refuse the name of a data set that the suite does not have."""
        grids = [*self.grids, *([self.tuning.grid] if self.tuning else [])]
        known = sorted({dataset for grid in grids for dataset in grid.datasets})
        for name in set(names) - set(known):
            raise SuiteError(
                f"suite '{self.name}' has no data set '{name}'; it has {', '.join(known)}"
            )

    def _expanded(self, grid: Grid, tuned: Mapping[str, Overrides]) -> Iterator[Work]:
        for dataset, model, partition, strategy, seed in itertools.product(
            grid.datasets, grid.models, grid.partitions, grid.strategies, grid.seeds
        ):
            names: Overrides = {"dataset": dataset, "model": model, "partition": partition}
            config = {**self._config(grid, names, strategy, tuned), "seed": seed}
            try:
                config = with_equal_steps(config) if strategy else config
            except FedFusionError as problem:
                raise SuiteError(
                    f"suite '{self.name}', group '{grid.name}', strategy '{strategy}': {problem}"
                ) from problem
            yield Work(
                group=grid.name,
                strategy=strategy,
                dataset=dataset,
                model=model,
                partition=partition,
                seed=seed,
                config=config,
                seconds=grid.seconds,
                first=seed == grid.seeds[0],
                served=grid.served,
            )

    def _config(
        self, grid: Grid, names: Overrides, strategy: str, tuned: Mapping[str, Overrides]
    ) -> Overrides:
        """What all these names stand for; of two that set a key the later counts."""
        layers = [self.common, grid.config]
        for key, name in names.items():
            layers += [{key: name}, self.tables[f"{key}s"].get(str(name), {})]
        if strategy:
            root, *variants = self._line(strategy)
            own = self.tables["strategies"]
            layers += [{"strategy": root}, own.get(root, {}), tuned.get(root, {})]
            layers += [own[variant] for variant in variants]
        return {k: v for layer in layers for k, v in layer.items() if k != "based-on"}

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


def with_equal_steps(config: Mapping[str, Any]) -> Overrides:
    """The same overrides with the strategy's own number of rounds; checks them, too.

    Raises
    ------
    ConfigError
        If they are no run config.
    """
    parsed = RunConfig.from_run_config(config)
    rounds = strategy_class(parsed.strategy).rounds_of_equal_steps(parsed)
    return {**config, "num-server-rounds": rounds}


def load_suite(name: str) -> Suite:
    """A suite that comes with the package, by name, or one's own, by path.

    Raises
    ------
    SuiteError
        One sentence: what is wrong with which part.
    """
    folder = files("fedfusion_flwr.experiments") / "suites"
    shipped = {entry.name.removesuffix(".toml"): entry for entry in folder.iterdir()}
    if name in shipped:
        return parse_suite(shipped[name].read_text(encoding="utf-8"))
    path = Path(name)
    if not path.is_file():
        raise SuiteError(
            f"there is no suite '{name}': use one of {', '.join(sorted(shipped))}, or the path of "
            "a .toml file of your own"
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
        return _checked(tomllib.loads(text), text, name)
    except SuiteError:
        raise
    except tomllib.TOMLDecodeError as problem:
        raise SuiteError(f"suite '{name}' is not TOML: {problem}") from problem
    except (TypeError, AttributeError, ValueError) as problem:
        # A number for a table, a string for a list, ...: the parts are too many to name them all.
        raise SuiteError(
            f"suite '{name}' is not laid out as docs/compare.md says: {problem}"
        ) from problem


def _checked(table: dict[str, Any], text: str, name: str) -> Suite:
    name = str(table.get("name", name))
    _only(table, _SUITE, f"suite '{name}'")
    groups = table.get("groups", [])
    if not groups:
        raise SuiteError(f"suite '{name}' has no [[groups]]")
    grids = [_grid(group, f"suite '{name}', group '{group.get('name')}'") for group in groups]
    pooled = table.get("centralized", {})
    suite = Suite(
        name,
        text,
        dict(table.get("common", {})),
        {axis: dict(table.get(axis, {})) for axis in AXES},
        grids,
        table.get("keep"),
        _tuning(table["tune"], f"suite '{name}', tune") if "tune" in table else None,
        _pooled(pooled, grids, f"suite '{name}', centralized") if "centralized" in table else [],
        pooled.get("batch-seeds", [0]),
    )
    # What is wrong shows now and not after hours.
    suite.cells({})
    suite.tune_cells()
    return suite


def _grid(group: dict[str, Any], where: str, allowed: set[str] = _GROUP) -> Grid:
    _only(group, allowed, where)
    if group.get("name") in (TUNE, CENTRALIZED):
        raise SuiteError(f"{where}: that name is taken; choose another")
    for axis in (*(set(AXES) & allowed), "seeds"):
        if not isinstance(group.get(axis), list) or not group[axis]:
            raise SuiteError(f"{where}: {axis} must be a list of one or more")
    own = {key: group[key] for key in group.keys() & Grid.__dataclass_fields__.keys()}
    seconds = float(group.get("seconds", 0))
    return Grid(**{"name": TUNE, "strategies": [], **own, "seconds": seconds})


def _tuning(table: dict[str, Any], where: str) -> Tuning:
    candidates: dict[str, list[Overrides]] = table.get("candidates", {})
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


def _pooled(table: dict[str, Any], grids: list[Grid], where: str) -> list[Grid]:
    """The grids of the groups named; with their own seeds if no others are given."""
    _only(table, _CENTRALIZED, where)
    known = [grid.name for grid in grids]
    wanted = table.get("groups", known)
    for group in wanted:
        if group not in known:
            raise SuiteError(f"{where}: there is no group '{group}'; there are {known}")
    return [
        replace(
            grid,
            name=CENTRALIZED,
            strategies=[""],
            partitions=grid.partitions[:1],
            seeds=table.get("seeds", grid.seeds),
            config={**grid.config, **table.get("config", {})},
            seconds=float(table.get("seconds", 0)),
        )
        for grid in grids
        if grid.name in wanted
    ]


def _only(table: Mapping[str, Any], allowed: set[str], where: str) -> None:
    for key in table:
        if key not in allowed:
            close = difflib.get_close_matches(key, allowed, n=1)
            hint = f"did you mean '{close[0]}'?" if close else f"known are {sorted(allowed)}"
            raise SuiteError(f"{where}: unknown key '{key}'; {hint}")
