# SPDX-License-Identifier: Apache-2.0
"""What does noise on the uploaded statistics cost? Recovery of planted groups, and accuracy.

    python benchmarks/noise.py            # runs what is missing, one process
    python benchmarks/noise.py --table    # prints the Markdown table of the stored results

Every finished run is one row of ``benchmarks/results/noise.jsonl``; a run that is there already is
not repeated. The scenario is ``components-unequal`` of ``defaults.py``.
"""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from pandas import DataFrame

from benchmarks.defaults import SCENARIOS
from benchmarks.in_process import Grid, run_federation
from fedfusion_flwr.experiments.rows import Row, read_rows

RESULTS = Path(__file__).parent / "results" / "noise.jsonl"
SEEDS = (0, 1, 2)
AMOUNTS = (0.0, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
CONFIG: dict[str, Any] = {**SCENARIOS["components-unequal"], "fraction-evaluate": 0.0}


def run_cell(amount: float, seed: int) -> Row:
    """Run one federation in this process."""
    config = {**CONFIG, "statistics-noise": amount, "seed": seed}
    metrics, about = run_federation(config)
    accuracy = [row["global-accuracy"] for row in metrics]
    return {
        "config": config,
        "last-five-accuracy": statistics.mean(accuracy[-5:]),
        "last-five-rand-index": statistics.mean(row["adjusted-rand-index"] for row in metrics[-5:]),
        "accuracy": accuracy,
        "adjusted-rand-index": [row.get("adjusted-rand-index") for row in metrics],
        **about,
    }


def table() -> str:
    """Markdown: means over seeds of the means of the last five rounds, and their ranges."""
    lines = [
        "| `statistics-noise` | seeds | adjusted Rand index | lowest to highest | accuracy "
        "| lowest to highest |",
        "|---|---|---|---|---|---|",
    ]
    for amount, group in DataFrame(read_rows(RESULTS)).groupby("amount"):
        values = [group["last-five-rand-index"], group["last-five-accuracy"]]
        shown = [f"{v.mean():.3f} | {v.min():.3f} to {v.max():.3f}" for v in values]
        lines.append(f"| {amount:g} | {len(group)} | {' | '.join(shown)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    cells = [(amount, seed) for seed in SEEDS for amount in AMOUNTS]
    columns = {"amount": float, "seed": int}
    Grid(RESULTS, columns, cells, run_cell).command_line(__doc__ or "", table)
