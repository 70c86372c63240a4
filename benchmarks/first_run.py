# SPDX-License-Identifier: Apache-2.0
"""The README's first run with ten seeds, in this process.

    python benchmarks/first_run.py            # runs the seeds that have no row yet
    python benchmarks/first_run.py --table    # prints the README's sentence

One row a seed in ``benchmarks/results/first-run.jsonl``.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

from benchmarks.in_process import run_federation
from fedfusion_flwr import RunConfig
from fedfusion_flwr.experiments.rows import Row, append_row, read_rows

RESULTS = Path(__file__).parent / "results" / "first-run.jsonl"
SEEDS = range(10)


def first_run(seed: int) -> Row:
    """Every key at its default but the seed."""
    metrics, about = run_federation(RunConfig(seed=seed).to_run_config())
    return {
        "seed": seed,
        "global-accuracy": [row["global-accuracy"] for row in metrics],
        "personalized-accuracy": metrics[-1]["personalized-accuracy"],
        "adjusted-rand-index": [round(row["adjusted-rand-index"], 3) for row in metrics[1:]],
        **about,
    }


def sentence() -> str:
    """What the README says of the rows."""
    rows = read_rows(RESULTS)
    accuracies = [row["global-accuracy"][-1] for row in rows]
    found = [statistics.mean(row["adjusted-rand-index"][5:]) for row in rows]
    return (
        f"Over {len(rows)} seeds the final test accuracy is {min(accuracies):.3f} to "
        f"{max(accuracies):.3f}, {statistics.mean(accuracies):.3f} in the mean, and the adjusted "
        f"Rand index of rounds 6 to {len(rows[0]['adjusted-rand-index'])} is {min(found):.2f} to "
        f"{max(found):.2f}"
    )


def main() -> None:
    """Run what is missing, or print the sentence."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--table", action="store_true", help="only print the README's sentence")
    if not parser.parse_args().table:
        done = {row["seed"] for row in read_rows(RESULTS)}
        for seed in SEEDS:
            if seed not in done:
                append_row(RESULTS, first_run(seed))
    print(sentence())


if __name__ == "__main__":
    main()
