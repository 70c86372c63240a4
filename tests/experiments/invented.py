# SPDX-License-Identifier: Apache-2.0
"""Rows of runs that never were, with numbers that are easy to reckon with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def row(
    strategy: str,
    seed: int,
    accuracies: Sequence[float | None],
    *,
    partition: str = "iid",
    group: str = "main",
    personalized: float | None = None,
    **more: Any,
) -> dict[str, Any]:
    """A row; every round after 0 moves 100 bytes down, 50 up, and takes 10 gradient steps."""
    metrics: list[dict[str, Any]] = []
    for number, accuracy in enumerate(accuracies):
        metrics.append({"round": number, "global-accuracy": accuracy, "global-loss": 2.0 - number})
        if number:
            metrics[-1] |= {"bytes-down": 100.0, "bytes-up": 50.0, "client-steps": 10.0}
    if personalized is not None:
        metrics[-1]["personalized-accuracy"] = personalized
    return {
        "cell": f"{group}-{partition}-{strategy}-s{seed}",
        "strategy": strategy,
        "dataset": "digits",
        "model": "lenet",
        "partition": partition,
        "seed": seed,
        "group": group,
        "config": {},
        "metrics": metrics,
        "seconds": 4.0,
        **more,
    }
