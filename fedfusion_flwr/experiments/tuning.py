# SPDX-License-Identifier: Apache-2.0
"""Which candidate of every strategy is best."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from fedfusion_flwr.experiments.results import rounds_table
from fedfusion_flwr.experiments.rows import Row
from fedfusion_flwr.experiments.suite import Tuning
from fedfusion_flwr.experiments.work import Overrides

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


def scores(tuning: Tuning, rows: Sequence[Row]) -> dict[str, dict[int, float]]:
    """Strategy -> candidate -> mean score over its cells; only candidates with all their cells."""
    grid = tuning.grid
    needed = len(grid.datasets) * len(grid.models) * len(grid.partitions) * len(grid.seeds)
    found: dict[str, dict[int, list[float]]] = {strategy: {} for strategy in tuning.candidates}
    for row in rows:
        strategy = row["strategy"]
        value = score(row, tuning.metrics[strategy])
        found[strategy].setdefault(row["candidate"], []).append(value)
    return {
        strategy: {
            number: statistics.mean(values)
            for number, values in sorted(candidates.items())
            if len(values) == needed
        }
        for strategy, candidates in found.items()
    }


def winners(tuning: Tuning, rows: Sequence[Row]) -> dict[str, Overrides]:
    """The best candidate of every strategy that has one; the first of equals."""
    return {
        strategy: tuning.candidates[strategy][max(found, key=lambda n: found[n])]
        for strategy, found in scores(tuning, rows).items()
        if found
    }
