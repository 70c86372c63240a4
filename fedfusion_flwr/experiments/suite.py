# SPDX-License-Identifier: Apache-2.0
"""Suites: which runs are compared."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fedfusion_flwr.config import RunConfig, Value
from fedfusion_flwr.errors import FedFusionError
from fedfusion_flwr.experiments.work import Cell, Overrides, Reference
from fedfusion_flwr.strategies.registry import strategy_class

AXES = {
    "strategies": "strategy",
    "datasets": "dataset",
    "models": "model",
    "partitions": "partition",
}
"""Tables of a suite, and the run-config key that a name without a table is the value of."""


class SuiteError(FedFusionError, ValueError):
    """A suite that does not exist or cannot be run."""


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
    served: bool = False


@dataclass(frozen=True)
class Tuning:
    """Candidates of every strategy, tried in one grid, and the metric that decides for each."""

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

    def references(self) -> list[Reference]:
        """What is trained on the pooled data, too; if several groups want it, the first counts.

        The group's first partition says how many gradient steps the reference takes.
        """
        found: dict[str, Reference] = {}
        for grid in self.centralized:
            for dataset, model, seed, batch_seed in itertools.product(
                grid.datasets, grid.models, grid.seeds, self.batch_seeds
            ):
                config = merged(
                    self.common,
                    grid.config,
                    self.named("datasets", dataset),
                    self.named("models", model),
                    self.named("partitions", grid.partitions[0]),
                    {"seed": seed},
                )
                reference = Reference(dataset, model, seed, batch_seed, config, grid.seconds)
                found.setdefault(reference.id, reference)
        return list(found.values())

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
            yield Cell(
                *names, seed, config, grid.seconds, candidate, seed == grid.seeds[0], grid.served
            )

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


def merged(*overrides: Mapping[str, Value]) -> Overrides:
    """One table of overrides; if two set a key, the later counts."""
    result: Overrides = {}
    for table in overrides:
        result |= table
    return result


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
