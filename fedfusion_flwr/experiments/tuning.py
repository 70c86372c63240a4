# SPDX-License-Identifier: Apache-2.0
"""Which candidate of every strategy is best."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from pandas import DataFrame

from fedfusion_flwr.experiments.results import rounds_table
from fedfusion_flwr.experiments.rows import Row
from fedfusion_flwr.experiments.work import Overrides, Tuning

LAST_ROUNDS = 5
"""The tuning judges by the mean of this many last values of its metric: one is too noisy."""


def score(row: Row, metric: str) -> float:
    """Mean of the metric's last values after round 0, at most `LAST_ROUNDS`; a loss is negated."""
    rounds = rounds_table([row["metrics"]])
    values = rounds.loc[rounds["round"] > 0, metric].dropna()
    if values.empty:
        return float("-inf")
    mean = float(values.iloc[-LAST_ROUNDS:].mean())
    return -mean if metric.endswith("loss") else mean


def candidates(tuning: Tuning, rows: Sequence[Row]) -> DataFrame:
    """Every candidate of every strategy.

    Returns
    -------
    DataFrame
        ``strategy``, ``candidate``, ``metric``, ``score`` (the mean over its cells, NaN if it has
        not all of them) and ``chosen``: the best of its strategy, the first of equals.
    """
    grid = tuning.grid
    needed = len(grid.datasets) * len(grid.models) * len(grid.partitions) * len(grid.seeds)
    lines = []
    for strategy, tried in tuning.candidates.items():
        metric = tuning.metrics[strategy]
        for number, candidate in enumerate(tried):
            own = [r for r in rows if (r["strategy"], r["candidate"]) == (strategy, number)]
            scores = [score(row, metric) for row in own]
            mean = statistics.mean(scores) if len(scores) == needed else float("nan")
            name = ", ".join(f"{key} = {value}" for key, value in candidate.items())
            lines.append((strategy, name, metric, mean))
    table = DataFrame(lines, columns=["strategy", "candidate", "metric", "score"])
    best = table.groupby("strategy")["score"].transform("max")
    scored = table[table["score"] == best]
    return table.assign(chosen=table.index.isin(scored.drop_duplicates("strategy").index))


def winners(tuning: Tuning, table: DataFrame) -> dict[str, Overrides]:
    """The chosen candidate of every strategy that has one."""
    tried = [candidate for of in tuning.candidates.values() for candidate in of]
    return {table["strategy"][i]: tried[i] for i in table.index[table["chosen"]]}
