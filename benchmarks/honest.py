# SPDX-License-Identifier: Apache-2.0
"""What does the robust preset do to honest clients that differ? Nobody attacks here.

    python benchmarks/honest.py            # runs what is missing, one process
    python benchmarks/honest.py --table    # prints the Markdown table of the stored results

Every finished run is one row of ``benchmarks/results/honest.jsonl``; a run that is there already is
not repeated.
"""

from __future__ import annotations

import itertools
import statistics
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.in_process import Grid
from benchmarks.robustness import last_accuracy
from fedfusion_flwr.app.local import run_locally
from fedfusion_flwr.experiments.rows import Row, identity, read_rows

RESULTS = Path(__file__).parent / "results" / "honest.jsonl"
CONFIG: dict[str, Any] = {
    "num-clients": 20,
    "num-server-rounds": 8,
    "server-momentum": 0.0,
    "average-decay": 0.0,
    "fraction-evaluate": 0.0,
    "checkpoint-every": 0,
    "seed": 0,
}
_DIRICHLET = {"partition": "dirichlet", "dirichlet-alpha": 0.1}
_LONG_TAILED = {"partition": "components", "component-sizes": "long-tailed"}
SCENARIOS: dict[str, dict[str, Any]] = {
    "iid": {"partition": "iid"},
    "dirichlet 0.1": _DIRICHLET,
    "two classes a client": {"partition": "pathological"},
    "components": {"partition": "components"},
    "components, unequal": _LONG_TAILED,
    "components, unequal, clip-quantile 0.8": {**_LONG_TAILED, "clip-quantile": 0.8},
    "components, turned images": {"partition": "components", "component-transform": "rotate"},
    "dirichlet 0.1, 5 epochs": {**_DIRICHLET, "local-epochs": 5},
    "components, unequal, 5 epochs": {**_LONG_TAILED, "local-epochs": 5},
    "dirichlet 0.1, 5 of 20": {**_DIRICHLET, "fraction-train": 0.25},
}
DEFENCES = ("none", "robust")


def run_cell(scenario: str, defence: str) -> Row:
    """Run one federation in this process."""
    from client_app import app

    about = identity()
    config = {**CONFIG, **SCENARIOS[scenario], "defence": defence}
    with tempfile.TemporaryDirectory() as folder:
        digest = run_locally({**config, "output-dir": folder}, app).digest
        metrics = read_rows(Path(folder) / "metrics.jsonl")
        replies = read_rows(Path(folder) / "clients.jsonl")
    details = [row.get("detail", "") for row in replies]
    bounds = {row["round"]: row.get("clip-bound") for row in metrics}
    kept = [
        min(1.0, bounds[row["round"]] / row["update-norm"]) if "update-norm" in row else 1.0
        for row in replies
    ]
    return {
        "config": config,
        "replies": len(replies),
        "dropped": sum("dropped" in row for row in replies),
        "clipped": sum("clipped" in detail for detail in details),
        "shortened": 1 - statistics.mean(kept),
        "capped": sum("examples count as" in detail for detail in details),
        "highest-score": max(row.get("outlier-score", 0.0) for row in replies),
        "accuracy": [row["global-accuracy"] for row in metrics],
        "digest": digest,
        **about,
    }


def table() -> str:
    """Markdown: what was dropped, cut and clipped, and `last_accuracy` with it and without."""
    lines = [
        "| scenario | highest score | dropped | counts cut | clipped | by | accuracy | without |",
        "|---|---|---|---|---|---|---|---|",
    ]
    rows = {(row["scenario"], row["defence"]): row for row in read_rows(RESULTS)}
    for scenario in SCENARIOS:
        robust, none = (rows.get((scenario, defence)) for defence in ("robust", "none"))
        if robust is None or none is None:
            continue
        count = robust["replies"]
        lines.append(
            f"| {scenario} | {robust['highest-score']:.1f} | {robust['dropped']} of {count} "
            f"| {robust['capped'] / count:.0%} | {robust['clipped'] / count:.0%} "
            f"| {robust['shortened']:.0%} | {last_accuracy(robust):.3f} "
            f"| {last_accuracy(none):.3f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    cells = list(itertools.product(SCENARIOS, DEFENCES))
    columns = {"scenario": str, "defence": str}
    Grid(RESULTS, columns, cells, run_cell).command_line(__doc__ or "", table)
