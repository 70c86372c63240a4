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

from benchmarks.defaults import SCENARIOS
from benchmarks.in_process import grid_command_line, run_federation, run_in_processes
from fedfusion_flwr.experiments.rows import Row, read_rows

RESULTS = Path(__file__).parent / "results" / "noise.jsonl"
SEEDS = (0, 1, 2)
AMOUNTS = (0.0, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
CONFIG: dict[str, Any] = {**SCENARIOS["components-unequal"], "fraction-evaluate": 0.0}


def cells() -> list[tuple[float, int]]:
    """Every (amount, seed) of the table."""
    return [(amount, seed) for seed in SEEDS for amount in AMOUNTS]


def run_cell(amount: float, seed: int) -> Row:
    """Run one federation in this process and return its row."""
    config = {**CONFIG, "statistics-noise": amount, "seed": seed}
    metrics, about = run_federation(config)
    accuracy = [row["global-accuracy"] for row in metrics]
    return {
        "amount": amount,
        "seed": seed,
        "config": config,
        "last-five-accuracy": statistics.mean(accuracy[-5:]),
        "last-five-rand-index": statistics.mean(row["adjusted-rand-index"] for row in metrics[-5:]),
        "accuracy": accuracy,
        "adjusted-rand-index": [row.get("adjusted-rand-index") for row in metrics],
        **about,
    }


def run_missing(workers: int) -> None:
    """Run every cell that has no row yet, each in a process of its own."""
    done = {(row["amount"], row["seed"]) for row in read_rows(RESULTS)}
    run_in_processes([cell for cell in cells() if cell not in done], [], workers)


def table() -> str:
    """Markdown: means over seeds of the means of the last five rounds, and their ranges."""
    lines = [
        "| `statistics-noise` | seeds | adjusted Rand index | lowest to highest | accuracy "
        "| lowest to highest |",
        "|---|---|---|---|---|---|",
    ]
    rows = read_rows(RESULTS)
    for amount in AMOUNTS:
        group = [row for row in rows if row["amount"] == amount]
        if group:
            shown = [
                f"{statistics.mean(values):.3f} | {min(values):.3f} to {max(values):.3f}"
                for key in ("last-five-rand-index", "last-five-accuracy")
                if (values := [row[key] for row in group])
            ]
            lines.append(f"| {amount:g} | {len(group)} | {' | '.join(shown)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    columns = {"AMOUNT": float, "SEED": int}
    grid_command_line(__doc__ or "", RESULTS, columns, run_cell, run_missing, table)
