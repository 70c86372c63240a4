# SPDX-License-Identifier: Apache-2.0
"""A run in a few numbers: its last round, its best rounds and what it cost."""

from __future__ import annotations

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


class RunSummary:
    """``summary.json``: last and best accuracy, each with its round, and the costs of all rounds.

    The best global round is chosen by the test set and says nothing of what a run without one would
    have kept; the last round is the figure to compare.
    """

    STATE = ("last", "best", "costs")

    def __init__(self) -> None:
        self.last: dict[str, dict[str, float]] = {}
        self.best: dict[str, dict[str, float]] = {}
        self.costs = dict.fromkeys(COSTS, 0.0)

    def on_round_end(self, report: RoundReport) -> None:
        """Take note of a finished round; the first of equally good rounds stays the best."""
        for name in COSTS:
            self.costs[name] += report.metrics.get(name, 0.0)
        for name in ACCURACIES:
            if name in report.metrics and report.server_round > 0:
                row = {"round": report.server_round, name: report.metrics[name]}
                self.last[name] = row
                if name not in self.best or row[name] > self.best[name][name]:
                    self.best[name] = row

    def summary(self) -> dict[str, Any]:
        """What is written to ``summary.json``."""
        return {"last-round": self.last, "best-round": self.best, "costs": self.costs}

    def __str__(self) -> str:
        parts = []
        for label, rows in (("Last round", self.last), ("Best round", self.best)):
            for name, row in rows.items():
                kind = name.removesuffix("-accuracy")
                parts.append(f"{label}: {row['round']:.0f}, {kind} accuracy {row[name]:.4f}")
        return "; ".join(parts)
