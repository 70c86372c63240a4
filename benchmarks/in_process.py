# SPDX-License-Identifier: Apache-2.0
"""What benchmarks share: federations run in this process, and the rows of their results.

Without Ray; the numbers of a run are the same. A result file holds one JSON object a line.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Any

from fedfusion_flwr.experiments.rows import Row, append_row, identity, read_rows

__all__ = ["Row", "append_row", "read_rows", "run_federation", "run_in_processes"]


def run_federation(config: dict[str, Any]) -> tuple[list[Row], Row]:
    """Run one federation; its metrics of every round from 0, and what identifies the run."""
    from flwr.app import Context, RecordDict

    from client_app import app
    from fedfusion_flwr.server import run
    from fedfusion_flwr.simulation import InProcessGrid

    about = identity()  # Before the run, while nobody has changed a file.
    with tempfile.TemporaryDirectory() as folder:
        context = Context(1, 0, {}, RecordDict(), {**config, "output-dir": folder})
        started = time.perf_counter()
        outcome = run(InProcessGrid(app, config["num-clients"], context.run_config), context)
        seconds = time.perf_counter() - started
        metrics = read_rows(outcome.directory / "metrics.jsonl")
    return metrics, {"digest": outcome.digest, "seconds": round(seconds, 1), **about}


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
