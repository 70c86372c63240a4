# SPDX-License-Identifier: Apache-2.0
"""A run in a few numbers: its last round, its best rounds and what it cost."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from fedfusion_flwr.federation.round import RoundReport

ACCURACIES = ("global-accuracy", "personalized-accuracy")
COSTS = (
    "bytes-down",
    "bytes-up",
    "client-steps",
    "extra-forward-examples",
    "server-aggregations",
)


@dataclass
class Totals:
    """Last and best accuracies with their rounds, and summed costs, each by name."""

    last: dict[str, dict[str, float]] = field(default_factory=dict)
    best: dict[str, dict[str, float]] = field(default_factory=dict)
    costs: dict[str, float] = field(default_factory=lambda: dict.fromkeys(COSTS, 0.0))


class RunSummary:
    """``summary.json``: last and best accuracy, each with its round, and the costs of all rounds.

    The best global round is chosen with the test set, which flatters it; compare runs by their last
    round.
    """

    def __init__(self) -> None:
        self.state = Totals()

    def on_round_end(self, report: RoundReport) -> None:
        """Add a finished round; the first of equally good rounds stays the best."""
        totals = self.state
        for name in COSTS:
            totals.costs[name] += report.metrics.get(name, 0.0)
        for name in ACCURACIES:
            if name in report.metrics and report.server_round > 0:
                row = {"round": report.server_round, name: report.metrics[name]}
                totals.last[name] = row
                if name not in totals.best or row[name] > totals.best[name][name]:
                    totals.best[name] = row

    def summary(self) -> dict[str, Any]:
        """The content of ``summary.json``."""
        totals = self.state
        return {"last-round": totals.last, "best-round": totals.best, "costs": totals.costs}

    def __str__(self) -> str:
        parts = []
        for label, rows in (("Last round", self.state.last), ("Best round", self.state.best)):
            for name, row in rows.items():
                kind = name.removesuffix("-accuracy")
                parts.append(f"{label}: {row['round']:.0f}, {kind} accuracy {row[name]:.4f}")
        return "; ".join(parts)
