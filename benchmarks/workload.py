# SPDX-License-Identifier: Apache-2.0
"""The rounds that contenders are timed on: the same data, model and gradient steps for each.

A contender is a function of a `Workload` and a folder with its pictures; it tells when its rounds
began. Each turn of each contender is a process of its own:
``python -m benchmarks.workload MODULE:FUNCTION JOB``.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

import numpy as np

from fedfusion_flwr.user_code import load_function

Note = TypeVar("Note")
ROOT = Path(__file__).parents[1]
PICTURES = "pictures.npz"
WARM_UP = 2
"""First rounds of a turn that do not count: they load, build and fill caches."""


@dataclass(frozen=True)
class Workload:
    """Clients with as many examples each, one local epoch a round; by default Fashion-MNIST's size.

    ``actors`` is the number of processes of one thread, or of threads, that clients may use.
    """

    rounds: int = 12
    precision: str = "fp32"
    clients: int = 10
    examples: int = 1200
    side: int = 28
    batch: int = 32
    actors: int = 2

    def config(self, folder: Path) -> dict[str, Any]:
        """The same for the app; only the initial and the last model are tested."""
        return {
            "dataset": "npz",
            "data-root": str(folder / PICTURES),
            "partition": "iid",
            "num-clients": self.clients,
            "num-server-rounds": self.rounds,
            "batch-size": self.batch,
            "precision": self.precision,
            "validation-fraction": 0.0,
            "fraction-evaluate": 0.0,
            "central-evaluate-every": self.rounds + 1,
        }

    def write_pictures(self, folder: Path) -> None:
        """Made-up grey pictures of ten classes; what they show has no bearing on the time."""
        generator = np.random.default_rng(0)
        arrays = {}
        for split, count in (("train", self.clients * self.examples), ("test", 100)):
            pixels = generator.integers(0, 256, (count, self.side, self.side))
            arrays |= {f"x_{split}": pixels.astype(np.uint8), f"y_{split}": np.arange(count) % 10}
        np.savez(folder / PICTURES, **arrays)


Contender = Callable[[Workload, Path], list[float]]


def in_simulation(
    main: Callable[[Any, Any], object],
    client_app: Any,
    work: Workload,
    note: Callable[[], Note] = time.perf_counter,  # type: ignore[assignment]
) -> list[Note]:
    """Run in Flower's simulation with one CPU an actor; a note of each round's start.

    That is when its training messages go out: what a round takes is from one to the next.
    """
    from flwr.app import Context, Message
    from flwr.serverapp import Grid, ServerApp
    from flwr.simulation import run_simulation

    server_app = ServerApp()
    starts: list[Note] = []

    @server_app.main()
    def note_and_run(grid: Grid, context: Context) -> None:
        send = grid.send_and_receive

        def noting(messages: Iterable[Message], **options: Any) -> Iterable[Message]:
            asked = list(messages)
            if any(message.metadata.message_type == "train" for message in asked):
                starts.append(note())
            return send(asked, **options)

        grid.send_and_receive = noting  # type: ignore[method-assign]
        main(grid, context)

    run_simulation(
        server_app,
        client_app,
        work.clients,
        backend_config={
            "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
            "init_args": {"num_cpus": work.actors},
        },
    )
    return starts


def turn(contender: str, work: Workload, folder: Path) -> list[float]:
    """Seconds of the rounds that count of one turn, in a process of its own."""
    job = folder / "job.json"
    told = {"work": dataclasses.asdict(work), "folder": str(folder)}
    job.write_text(json.dumps(told), encoding="utf-8")
    subprocess.run(
        [sys.executable, "-m", "benchmarks.workload", contender, str(job)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "FLWR_TELEMETRY_ENABLED": "0"},
        check=True,
    )
    starts = json.loads(job.read_text(encoding="utf-8"))["starts"]
    return periods(starts)


def periods(starts: list[float]) -> list[float]:
    """Seconds from one round's start to the next one's, without the first rounds."""
    return np.diff(starts)[WARM_UP:].tolist()


def taking_turns(
    contenders: dict[str, str], work: Workload, folder: Path, turns: int
) -> dict[str, list[float]]:
    """Each contender's median round in each of its turns, first all their first ones."""
    work.write_pictures(folder)
    medians: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(turns):
        for name, contender in contenders.items():
            medians[name].append(median(turn(contender, work, folder)))
    return medians


def main(arguments: list[str]) -> None:
    """Do one job and write its answer into its file."""
    contender, job = arguments[0], Path(arguments[1])
    told = json.loads(job.read_text(encoding="utf-8"))
    run = load_function("contender", contender, ValueError)  # type: ignore[arg-type]
    starts = run(Workload(**told["work"]), Path(told["folder"]))
    job.write_text(json.dumps({"starts": starts}), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
