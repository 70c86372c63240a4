# SPDX-License-Identifier: Apache-2.0
"""Do time and memory of a round stay flat with 1,000 clients, 20 of them a round?

    python benchmarks/scale.py [CASE ...] [--table]

100 rounds of FedFusion with a LeNet on 8 x 8 pictures, ten of them a client, and its files written
as ever; in Flower's simulation on two actors (the memory is the server's), and in one process (the
memory is that of the server and of all clients together).
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import median
from typing import Any

from flwr.app import Context, Message, RecordDict
from flwr.serverapp import Grid

from benchmarks.measuring import Columns, command_line, resident_bytes
from benchmarks.workload import Workload, in_simulation
from fedfusion_flwr.app.local import configured_app
from fedfusion_flwr.app.server import run
from fedfusion_flwr.experiments.rows import Row, read_rows
from fedfusion_flwr.federation.in_process_grid import InProcessGrid

RESULTS = Path(__file__).parent / "results" / "scale.jsonl"
WORK = Workload(rounds=100, clients=1000, examples=10, side=8)
SAMPLED = 20


def note() -> tuple[float, float]:
    """The time, and this process's memory in MiB."""
    return time.perf_counter(), resident_bytes() / 2**20


class NotingGrid(InProcessGrid):
    """A federation in this process that notes each round's start."""

    def __init__(self, client_app: Any, clients: int) -> None:
        super().__init__(client_app, clients)
        self.notes: list[tuple[float, float]] = []

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Note, send and answer."""
        asked = list(messages)
        if asked:
            self.notes.append(note())
        return super().send_and_receive(asked, timeout=timeout)


def measure(engine: str, work: Workload = WORK, sampled: int = SAMPLED) -> Row:
    """One case."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        work.write_pictures(folder)
        config = {
            **work.config(folder),
            "fraction-train": sampled / work.clients,
            "output-dir": f"{name}/run",
        }
        app = configured_app(config)
        if engine == "in process":
            grid = NotingGrid(app, work.clients)
            run(grid, Context(1, 0, {}, RecordDict(), config))
            notes = grid.notes
        else:

            def main(grid: Grid, context: Context) -> None:
                run(grid, dataclasses.replace(context, run_config=config))

            notes = in_simulation(main, app, work, note)
        laps = [row["seconds"] for row in read_rows(folder / "run" / "metrics.jsonl")[1:]]
    starts = [start for start, _ in notes]
    return {
        "clients": work.clients,
        "sampled": sampled,
        "actors": work.actors,
        "seconds": [round(b - a, 4) for a, b in itertools.pairwise(starts)],
        "infer-seconds": [round(lap["infer"], 4) for lap in laps],
        "megabytes": [round(used, 1) for _, used in notes],
    }


def quarters(values: list[float]) -> tuple[float, float]:
    """Medians of the first and of the last quarter."""
    quarter = len(values) // 4
    return median(values[:quarter]), median(values[-quarter:])


CASES = {engine: functools.partial(measure, engine) for engine in ("simulation", "in process")}


def _first_to_last(name: str, digits: int) -> Callable[[Row], str]:
    def show(row: Row) -> str:
        first, last = quarters(row[name])
        return f"{first:.{digits}f} to {last:.{digits}f}"

    return show


COLUMNS: Columns = {
    "clients": lambda row: f"{row['clients']:,}",
    "rounds": lambda row: len(row["megabytes"]),
    "s a round, first to last quarter": _first_to_last("seconds", 3),
    "of it inference, s": _first_to_last("infer-seconds", 3),
    "memory, MiB": _first_to_last("megabytes", 0),
}

if __name__ == "__main__":
    command_line(__doc__ or "", RESULTS, CASES, COLUMNS)
