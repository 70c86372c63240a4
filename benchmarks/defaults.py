# SPDX-License-Identifier: Apache-2.0
"""Which settings should be the default? FedFusion against FedAvg with the same budget.

    python benchmarks/defaults.py            # runs what is missing, two processes
    python benchmarks/defaults.py --table    # prints the Markdown table of the stored results

Every finished run is one row of ``benchmarks/results/defaults.jsonl``; a run that is there already
is not repeated. The federation is simulated in process, without Ray; a run's numbers are the same.
"""

from __future__ import annotations

import math
import statistics
from pathlib import Path
from typing import Any

from pandas import DataFrame

from benchmarks.in_process import Grid, run_federation
from fedfusion_flwr.experiments.rows import Row, read_rows

RESULTS = Path(__file__).parent / "results" / "defaults.jsonl"
SEEDS = (0, 1, 2)
SHARED: dict[str, Any] = {
    "learning-rate": 0.02,
    "server-momentum": 0.5,
    "average-decay": 0.8,
    "statistics-source": "local",
    "sampling": "random",
}
FULL = {"num-clients": 10, "num-server-rounds": 20}
PART = {"num-clients": 40, "fraction-train": 0.2, "num-server-rounds": 40}

SCENARIOS: dict[str, dict[str, Any]] = {
    "components-unequal": {"partition": "components", "component-sizes": "long-tailed", **FULL},
    "components-equal": {"partition": "components", "component-sizes": "balanced", **FULL},
    "dirichlet-0.1": {"partition": "dirichlet", "dirichlet-alpha": 0.1, **FULL},
    "iid": {"partition": "iid", **FULL},
    "components-unequal, 8 of 40": {
        "partition": "components",
        "component-sizes": "long-tailed",
        **PART,
    },
    "dirichlet-0.1, 8 of 40": {
        "partition": "dirichlet",
        "dirichlet-alpha": 0.1,
        "min-partition-size": 4,
        **PART,
    },
}
_PLAIN = {"server-momentum": 0.0, "average-decay": 0.0}
# "FedAvg" has FedFusion's server step, as today's strategy fedavgm; "FedAvg, plain" has none.
VARIANTS: dict[str, dict[str, Any]] = {
    "FedAvg, plain": {"strategy": "fedavg", "pool-moments": False, **_PLAIN},
    "FedAvg": {"strategy": "fedavgm"},
    "FedFusion rho 0.5": {"mixture": "balanced", "balance-exponent": 0.5},
    "FedFusion rho 0": {"mixture": "balanced", "balance-exponent": 0.0},
    "FedFusion inferred": {"mixture": "inferred"},
    "FedFusion rho 0.5, probe": {
        "mixture": "balanced",
        "balance-exponent": 0.5,
        "statistics-source": "probe",
    },
    "FedFusion rho 0.5, stratified": {
        "mixture": "balanced",
        "balance-exponent": 0.5,
        "sampling": "stratified",
    },
}
GRID: dict[str, tuple[str, ...]] = {
    "components-unequal": (
        "FedAvg, plain",
        "FedAvg",
        "FedFusion rho 0.5",
        "FedFusion rho 0",
        "FedFusion inferred",
        "FedFusion rho 0.5, probe",
    ),
    "components-unequal, 8 of 40": (
        "FedAvg",
        "FedFusion rho 0.5",
        "FedFusion rho 0.5, stratified",
    ),
    "dirichlet-0.1": ("FedAvg", "FedFusion rho 0.5"),
    "dirichlet-0.1, 8 of 40": (
        "FedAvg",
        "FedFusion rho 0.5",
        "FedFusion rho 0.5, stratified",
    ),
    "iid": ("FedAvg", "FedFusion rho 0.5"),
    "components-equal": ("FedAvg", "FedFusion rho 0.5"),
}


def cells() -> list[tuple[str, str, int]]:
    """Every (scenario, variant, seed) of the table."""
    return [
        (scenario, variant, seed)
        for scenario, variants in GRID.items()
        for variant in variants
        for seed in SEEDS
    ]


def run_cell(scenario: str, variant: str, seed: int) -> Row:
    """Run one federation in this process."""
    config = {**SHARED, **SCENARIOS[scenario], **VARIANTS[variant], "seed": seed}
    metrics, about = run_federation(config)
    accuracies = [row["global-accuracy"] for row in metrics[1:]]
    return {
        "config": config,
        "final-accuracy": accuracies[-1],
        "last-five-accuracy": statistics.mean(accuracies[-5:]),
        "best-accuracy": max(accuracies),
        "accuracy": accuracies,
        "adjusted-rand-index": [row.get("adjusted-rand-index") for row in metrics[1:]],
        **about,
    }


def stored() -> list[Row]:
    """The rows that are there already."""
    return read_rows(RESULTS)


def table() -> str:
    """Markdown: mean and range over seeds of the mean accuracy of the last five rounds."""
    rows = DataFrame(stored())
    rows["found"] = rows["adjusted-rand-index"].str[-1].astype(float)
    groups = dict(iter(rows.groupby(["scenario", "variant"])))
    lines = [
        "| scenario | setting | mean of last 5 rounds | lowest to highest seed | final | ARI |",
        "|---|---|---|---|---|---|",
    ]
    for scenario, variant in dict.fromkeys((scenario, variant) for scenario, variant, _ in cells()):
        if (scenario, variant) in groups:
            of = groups[scenario, variant]
            last, found = of["last-five-accuracy"], of["found"].mean()
            lines.append(
                f"| {scenario} | {variant} | {last.mean():.3f} | {last.min():.3f} to "
                f"{last.max():.3f} ({len(of)} seeds) | {of['final-accuracy'].mean():.3f} "
                f"| {'' if math.isnan(found) else f'{found:.2f}'} |"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    columns = {"scenario": str, "variant": str, "seed": int}
    Grid(RESULTS, columns, cells(), run_cell).command_line(__doc__ or "", table, workers=2)
