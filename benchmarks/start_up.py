# SPDX-License-Identifier: Apache-2.0
"""How long from `flwr run` to the first round's first training, and where does the time go?

    python benchmarks/start_up.py [CASE ...] [--table]

One round of two clients with a tiny model, so that what is left is the start. "cold" has no
SuperLink yet, as after a reboot; "warm" is the next run with the same one. When each phase is over
is read from what a run leaves anyway:

- accepted: `flwr run` is imported, the SuperLink is up and has the app's bundle (its database);
- process: the SuperLink has started the run's process, which has imported Flower (the same);
- Ray begins: the bundle is installed and Ray is imported (name of Ray's session folder);
- server ready: torch and the app are imported, data and model are built (config.json is written);
  this goes on beside Ray's start;
- actors begin: Ray is up and has started the clients' processes (first line of their logs);
- training: the clients have imported the app, built data and model, and begin (clients.jsonl).

Imports are cumulative times of ``python -X importtime``, in this order, in a process of their own.
"""

from __future__ import annotations

import datetime
import functools
import re
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.in_process import write_pictures
from benchmarks.measuring import Columns, command_line
from fedfusion_flwr.experiments.rows import Row
from tests.engine.harness import Engine, EngineRun

RESULTS = Path(__file__).parent / "results" / "start_up.jsonl"
CLIENTS = 2
CONFIG: dict[str, Any] = {
    "dataset": "npz",
    "partition": "iid",
    "num-clients": CLIENTS,
    "num-server-rounds": 1,
}
IMPORTS = {
    "torch": ("torch",),
    "flwr": ("flwr.serverapp", "flwr.clientapp", "flwr.simulation"),
    "ray": ("ray",),
    "app": ("server_app", "client_app"),
}
"""Modules by the name of their column, imported in this order."""


def measure(name: str) -> Row:
    """One case."""
    with tempfile.TemporaryDirectory() as folder:
        config = {**CONFIG, "data-root": str(write_pictures(Path(folder) / "pictures.npz"))}
        engine = Engine(Path(folder))
        # So that the session found is that of this run.
        engine.environment["RAY_TMPDIR"] = folder
        try:
            if name == "warm":
                engine.run(config, supernodes=CLIENTS)
            started = time.time()
            done = engine.run(config, supernodes=CLIENTS)
            ends = phase_ends(engine, done, started)
        finally:
            engine.stop()
    return {
        "ended": {phase: round(end - started, 2) for phase, end in ends.items()},
        "imports": imports(),
    }


def phase_ends(engine: Engine, done: EngineRun, started: float) -> dict[str, float]:
    """When each phase was over, in seconds since the epoch."""
    accepted, process = _task_times(engine.home / "local-superlink" / "state.db")
    training = min(row["train-started"] for row in done.clients())
    ray, session = _ray_session(engine.folder / "ray", started)
    return {
        "accepted": accepted,
        "process": process,
        "ray-begins": ray,
        "server-ready": (done.directory / "config.json").stat().st_mtime,
        "actors-begin": _actors_begin(session, training),
        "training": training,
    }


def _task_times(database: Path) -> tuple[float, float]:
    """When the newest run was accepted and its process ran; `flwr list` says whole seconds only."""
    connection = sqlite3.connect(f"file:{database}?mode=ro", uri=True)
    try:
        row = connection.execute(
            "SELECT pending_at, running_at FROM task WHERE type = 'flwr-simulation' "
            "ORDER BY pending_at DESC LIMIT 1"
        ).fetchone()
    finally:
        connection.close()
    accepted, process = (datetime.datetime.fromisoformat(stamp).timestamp() for stamp in row)
    return accepted, process


def _ray_session(folder: Path, after: float) -> tuple[float, Path]:
    """When Ray's session of this run began, and where it is; its name says when."""
    for session in folder.glob("session_2*"):
        stamp = session.name.removeprefix("session_").rpartition("_")[0]
        begun = datetime.datetime.strptime(stamp, "%Y-%m-%d_%H-%M-%S_%f").timestamp()
        if begun > after:
            return begun, session
    raise RuntimeError(f"no Ray session of this run in {folder}")


def _actors_begin(session: Path, before: float) -> float:
    """When the first of the clients' processes began; those before them are Ray's own reserve."""
    begun = []
    for log in session.glob("logs/python-core-worker-*.log"):
        with log.open(encoding="utf-8", errors="replace") as lines:
            found = re.match(r"\[(\S+ \S+?) ", lines.readline())
        if found:
            stamp = datetime.datetime.strptime(found.group(1), "%Y-%m-%d %H:%M:%S,%f")
            begun.append(stamp.timestamp())
    return sorted(moment for moment in begun if moment < before)[-CLIENTS]


def imports() -> dict[str, float]:
    """Seconds of each group of imports after those before it."""
    names = [name for group in IMPORTS.values() for name in group]
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", f"import {', '.join(names)}"],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        check=True,
    )
    return grouped(done.stderr)


def grouped(report: str) -> dict[str, float]:
    """Sum up the outermost lines of an ``importtime`` report.

    A line is ``import time: self us | cumulative us | name``, indented by two for each importer. A
    package is outermost beside its module: ``flwr`` comes before ``flwr.serverapp``.
    """
    totals = dict.fromkeys(IMPORTS, 0.0)
    owners = {name.split(".")[0]: key for key, names in IMPORTS.items() for name in names}
    for line in report.splitlines():
        found = re.fullmatch(r"import time: +\d+ \| +(\d+) \| (\S+)", line)
        if found and found.group(2).split(".")[0] in owners:
            totals[owners[found.group(2).split(".")[0]]] += int(found.group(1)) / 1e6
    return {key: round(value, 2) for key, value in totals.items()}


CASES = {name: functools.partial(measure, name) for name in ("cold", "warm")}


def _ended(phase: str) -> Callable[[Row], str]:
    return lambda row: f"{row['ended'][phase]:.1f}"


def _imported(key: str) -> Callable[[Row], str]:
    return lambda row: f"{row['imports'][key]:.2f}"


COLUMNS: Columns = {
    "accepted, s": _ended("accepted"),
    "process, s": _ended("process"),
    "Ray begins, s": _ended("ray-begins"),
    "server ready, s": _ended("server-ready"),
    "actors begin, s": _ended("actors-begin"),
    "training, s": _ended("training"),
    "import torch, s": _imported("torch"),
    "flwr, s": _imported("flwr"),
    "ray, s": _imported("ray"),
    "app, s": _imported("app"),
}

if __name__ == "__main__":
    command_line(__doc__ or "", RESULTS, CASES, COLUMNS)
