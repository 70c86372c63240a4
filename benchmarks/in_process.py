# SPDX-License-Identifier: Apache-2.0
"""What benchmarks share: federations run in this process, and the rows of their results.

Without Ray; the numbers of a run are the same. A result file holds one JSON object a line.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def run_federation(config: dict[str, Any]) -> tuple[list[Row], Row]:
    """Run one federation; its metrics of every round from 0, and what identifies the run."""
    from client_app import app

    about = identity()
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        digest = run_app({**config, "output-dir": folder}, app)
        seconds = time.perf_counter() - started
        metrics = read_rows(Path(folder) / "metrics.jsonl")
    return metrics, {"digest": digest, "seconds": round(seconds, 1), **about}


def run_app(config: dict[str, Any], client_app: Callable[..., Any]) -> str:
    """Run the ServerApp with these clients, rows into ``output-dir``; the final digest."""
    from flwr.app import Context, RecordDict

    from fedfusion_flwr.server import run
    from fedfusion_flwr.simulation import InProcessGrid

    context = Context(1, 0, {}, RecordDict(), config)
    grid = InProcessGrid(client_app, config["num-clients"], context.run_config)
    return run(grid, context).digest


def identity() -> Row:
    """Versions, commit and machine; ask before the run, while nobody has changed a file."""
    import torch

    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "flwr": version("flwr"),
        "commit": _commit(),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}",
    }


def _commit() -> str:
    """The commit that is checked out here, marked where files differ from it; or unknown."""
    command = ["git", "describe", "--always", "--dirty", "--exclude", "*"]
    folder = Path(__file__).parent
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def read_rows(path: Path) -> list[Row]:
    """The rows of a file; none where it does not exist."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def append_row(path: Path, row: Row) -> None:
    """Add a row to a file."""
    path.parent.mkdir(exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


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
