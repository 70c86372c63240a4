# SPDX-License-Identifier: Apache-2.0
"""What does a round cost in the engine, against a bare loop, a stock Flower app and pfl-research?

    python benchmarks/round_efficiency.py [CASE ...] [--table]

Ten clients of 1,200 pictures of Fashion-MNIST's size, LeNet, batches of 32, one local epoch, on two
cores; nothing is evaluated. Seconds from one round's start to the next one's, the median over the
rounds of a turn but its first two, and of the contenders' turns the best:

- fedfusion, fedavg: this app in Flower's simulation, two actors of one CPU and one thread;
- bare loop: two processes of one thread, five clients each, the same model, memory format,
  precision, optimizer and steps; parameters are loaded for each client, nothing is aggregated;
- stock app: `benchmarks/stock_app.py`, two actors of one CPU; always fp32, as the quickstart is;
- pfl: `benchmarks/pfl_app.py`, one process of two threads; where pfl-research is installed.

The case "no-op clients" has a tiny model and clients that send it back: what is left is the fixed
cost of a round, and its floor is Flower's own FedAvg with the same clients.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from benchmarks.measuring import Columns, command_line
from benchmarks.workload import Workload, taking_turns
from fedfusion_flwr.experiments.rows import Row

RESULTS = Path(__file__).parent / "results" / "round_efficiency.jsonl"
TURNS = 2
TRAINING = {
    "fedfusion": "benchmarks.contenders:fedfusion",
    "fedavg": "benchmarks.contenders:fedavg",
    "bare-loop": "benchmarks.contenders:bare_loops",
    "stock-app": "benchmarks.stock_app:round_starts",
    "pfl": "benchmarks.pfl_app:round_starts",
}
IDLE = {
    "fedfusion": "benchmarks.contenders:idle_fedfusion",
    "fedavg": "benchmarks.contenders:idle_fedavg",
    "engine-floor": "benchmarks.contenders:engine_floor",
}


def measure(contenders: dict[str, str], work: Workload, turns: int = TURNS) -> Row:
    """One case."""
    present = dict(contenders)
    if "pfl" in present and importlib.util.find_spec("pfl") is None:
        del present["pfl"]
        print(
            "pfl-research is not installed and is left out; pip install 'fedfusion-flwr"
            "[benchmarks]' brings it",
            file=sys.stderr,
        )
    with tempfile.TemporaryDirectory() as folder:
        medians = taking_turns(present, work, Path(folder), turns)
    return {
        "seconds": {name: min(values) for name, values in medians.items()},
        "turns": medians,
        "rounds": work.rounds,
        "clients": work.clients,
        "actors": work.actors,
        "cores": len(os.sched_getaffinity(0)),
    }


CASES = {
    "fp32": functools.partial(measure, TRAINING, Workload()),
    "bf16": functools.partial(measure, TRAINING, Workload(precision="bf16")),
    "no-op clients": functools.partial(measure, IDLE, Workload(rounds=40, examples=2, side=8)),
}


def _seconds(name: str) -> Callable[[Row], str]:
    return lambda row: f"{row['seconds'][name]:.2f}" if name in row["seconds"] else "-"


def _share(of: str) -> Callable[[Row], str]:
    """How many rounds FedFusion does while the other does one."""

    def show(row: Row) -> str:
        seconds = row["seconds"]
        return f"{seconds[of] / seconds['fedfusion']:.2f}" if of in seconds else "-"

    return show


def _to_floor(row: Row) -> str:
    seconds = row["seconds"]
    floor = seconds.get("engine-floor")
    return f"{seconds['fedfusion'] / floor:.2f}" if floor else "-"


COLUMNS: Columns = {
    "FedFusion, s": _seconds("fedfusion"),
    "FedAvg, s": _seconds("fedavg"),
    "bare loop, s": _seconds("bare-loop"),
    "stock app, s": _seconds("stock-app"),
    "pfl, s": _seconds("pfl"),
    "engine's floor, s": _seconds("engine-floor"),
    "efficiency to bare loop": _share("bare-loop"),
    "rounds to stock app's": _share("stock-app"),
    "rounds to pfl's": _share("pfl"),
    "cost to floor": _to_floor,
}

if __name__ == "__main__":
    command_line(__doc__ or "", RESULTS, CASES, COLUMNS)
