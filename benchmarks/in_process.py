# SPDX-License-Identifier: Apache-2.0
"""What benchmarks share: federations run in this process, and the rows of their results.

Without Ray; the numbers of a run are the same. A result file holds one JSON object a line.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedfusion_flwr.app.local import run_locally
from fedfusion_flwr.experiments.rows import Row, append_row, identity, read_rows


def run_federation(config: dict[str, Any]) -> tuple[list[Row], Row]:
    """Run one federation; its metrics of every round from 0, and what identifies the run."""
    about = identity()  # Before the run, while nobody has changed a file.
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        digest = run_locally({**config, "output-dir": folder}).digest
        seconds = time.perf_counter() - started
        metrics = read_rows(Path(folder) / "metrics.jsonl")
    return metrics, {"digest": digest, "seconds": round(seconds, 1), **about}


def write_pictures(path: Path, train: int = 240, test: int = 40) -> Path:
    """A data set for ``npz``: four classes of 8 x 8 images, which differ by a bright row."""
    import numpy as np

    generator = np.random.default_rng(0)
    arrays = {}
    for split, count in (("train", train), ("test", test)):
        labels = np.arange(count) % 4
        pixels = generator.integers(0, 120, (count, 8, 8))
        pixels[np.arange(count), 2 * labels] = 255
        arrays |= {f"x_{split}": pixels.astype(np.uint8), f"y_{split}": labels}
    np.savez(path, **arrays)
    return path


@dataclass(frozen=True)
class Grid:
    """Runs that differ in some columns. Each makes a row of a file, and none is repeated.

    Attributes
    ----------
    results : Path
        Where rows are appended.
    columns : Mapping[str, Callable[[str], Any]]
        What tells a run from the others, and how each is read from the command line.
    cells : Sequence[tuple]
        The columns of every run, in the order in which they are run.
    run_cell : Callable[..., Row]
        Runs one; what its row has beside the columns.
    """

    results: Path
    columns: Mapping[str, Callable[[str], Any]]
    cells: Sequence[tuple[Any, ...]]
    run_cell: Callable[..., Row]

    def command_line(self, doc: str, table: Callable[[], str], workers: int = 1) -> None:
        """Run what has no row yet, each in a process of its own, or just one; print the table."""
        names = tuple(name.upper() for name in self.columns)
        parser = argparse.ArgumentParser(description=doc.splitlines()[0])
        parser.add_argument("--table", action="store_true", help="only print the stored results")
        parser.add_argument("--workers", type=int, default=workers, help="processes side by side")
        parser.add_argument("--cell", nargs=len(names), metavar=names)
        arguments = parser.parse_args()
        if arguments.cell:
            readers = self.columns.values()
            cell = [read(text) for read, text in zip(readers, arguments.cell, strict=True)]
            named = dict(zip(self.columns, cell, strict=True))
            append_row(self.results, {**named, **self.run_cell(*cell)})
            return
        if not arguments.table:
            done = {tuple(row[name] for name in self.columns) for row in read_rows(self.results)}
            run_in_processes([c for c in self.cells if c not in done], [], arguments.workers)
        print(table())


def run_in_processes(cells: Sequence[tuple[Any, ...]], options: list[str], workers: int) -> None:
    """Call this program with ``--cell`` for each cell, ``workers`` at a time, one thread each."""
    waiting = [[str(part) for part in cell] for cell in cells]
    running: dict[subprocess.Popen[bytes], list[str]] = {}
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    while waiting or running:
        for process in [process for process in running if process.poll() is not None]:
            cell = running.pop(process)
            if process.returncode:
                print(f"failed | {' | '.join(cell)} | --cell shows why", flush=True)
        while waiting and len(running) < workers:
            cell = waiting.pop(0)
            print(f"{len(waiting)} left | {' | '.join(cell)}", flush=True)
            command = [sys.executable, sys.argv[0], *options, "--cell", *cell]
            process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
            running[process] = cell
        time.sleep(0.5)
