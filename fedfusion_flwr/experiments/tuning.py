# SPDX-License-Identifier: Apache-2.0
"""Which candidate of every strategy is best."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from fedfusion_flwr.experiments.overrides import Overrides
from fedfusion_flwr.experiments.rows import Row
from fedfusion_flwr.experiments.suite import Tuning

LAST_ROUNDS = 5
"""The tuning judges by the mean of so many last values of its metric: one is too noisy."""


def score(row: Row, metric: str) -> float:
    """Mean of the metric's last values after round 0, at most `LAST_ROUNDS`; a loss is negated."""
    values: list[float] = [
        r[metric] for r in row["metrics"] if r["round"] and r.get(metric) is not None
    ]
    if not values:
        return float("-inf")
    mean = statistics.mean(values[-LAST_ROUNDS:])
    return -mean if metric.endswith("loss") else mean


def scores(tuning: Tuning, rows: Sequence[Row]) -> dict[str, dict[int, float]]:
    """Strategy -> candidate -> mean score over its cells; only candidates with all their cells."""
    grid = tuning.grid
    needed = len(grid.datasets) * len(grid.models) * len(grid.partitions) * len(grid.seeds)
    result: dict[str, dict[int, float]] = {}
    for strategy, candidates in tuning.candidates.items():
        found: dict[int, float] = {}
        for number in range(len(candidates)):
            of = [r for r in rows if (r["strategy"], r["candidate"]) == (strategy, number)]
            if len(of) == needed:
                metric = tuning.metrics[strategy]
                found[number] = statistics.mean(score(row, metric) for row in of)
        result[strategy] = found
    return result


def winners(tuning: Tuning, rows: Sequence[Row]) -> dict[str, Overrides]:
    """The best candidate of every strategy that has one; of equals the first."""
    return {
        strategy: tuning.candidates[strategy][max(found, key=lambda n: found[n])]
        for strategy, found in scores(tuning, rows).items()
        if found
    }
