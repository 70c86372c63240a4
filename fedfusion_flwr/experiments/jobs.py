# SPDX-License-Identifier: Apache-2.0
"""Jobs in processes of their own, some side by side.

The other end is ``python -m fedfusion_flwr.experiments.jobs JOB``: JOB is a JSON file; the row, or
the reason why there is none, is written beside it. That process ends when its standard input does,
so it never outlives the one that started it.
"""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from fedfusion_flwr.errors import FedFusionError
from fedfusion_flwr.experiments.rows import Row, write_text

JOB, LOG, RESULT = "job.json", "log.txt", "result.json"
_GRACE_SECONDS = 10


@dataclass(frozen=True)
class Job:
    """What one process does.

    Attributes
    ----------
    id : str
        For messages.
    arguments : dict[str, Any]
        ``kind``, which is ``cell`` or ``centralized``, and the arguments of
        `federated.run_cell` or `centralized.train_centralized`.
    folder : Path
        Of the job, its result and its log.
    """

    id: str
    arguments: dict[str, Any]
    folder: Path


class _Running:
    """A started job."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.started = time.monotonic()
        write_text(job.folder / JOB, json.dumps(job.arguments))
        (job.folder / RESULT).unlink(missing_ok=True)
        command = [sys.executable, "-m", "fedfusion_flwr.experiments.jobs"]
        with (job.folder / LOG).open("wb") as log:
            self.process = subprocess.Popen(
                [*command, str(job.folder / JOB)],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={"OMP_NUM_THREADS": "1", "FLWR_TELEMETRY_ENABLED": "0", **os.environ},
                # Ctrl-C reaches this process only, which then ends the others.
                start_new_session=True,
            )

    def result(self) -> Row:
        """What the process wrote, or how it ended."""
        self.close()
        path = self.job.folder / RESULT
        if path.exists():
            result: Row = json.loads(path.read_text(encoding="utf-8"))
            return result
        code = self.process.returncode
        how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        return {"error": f"its process ended with {how}; see {self.job.folder / LOG}"}

    def stop(self) -> None:
        """End the process and all that it started."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(_GRACE_SECONDS)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def close(self) -> None:
        """The process ends when its standard input does."""
        with contextlib.suppress(OSError):
            assert self.process.stdin is not None
            self.process.stdin.close()


def run_jobs(jobs: Iterable[Job], workers: int) -> Generator[tuple[Job, Row], None, None]:
    """Run the jobs in order, ``workers`` at a time; yields each as it ends.

    Closing the iterator ends those that run, and so does an exception where it is used.

    Yields
    ------
    tuple[Job, Row]
        The job and ``{"row": ...}`` or ``{"error": sentence}``.
    """
    waiting, running = iter(jobs), list[_Running]()
    try:
        while True:
            for job in itertools.islice(waiting, workers - len(running)):
                running.append(_Running(job))
            if not running:
                return
            for ended in [one for one in running if one.process.poll() is not None]:
                running.remove(ended)
                yield ended.job, ended.result()
            time.sleep(0.1)
    finally:
        for one in running:
            one.close()
        for one in running:
            one.stop()


@contextlib.contextmanager
def interrupted_by_sigterm() -> Iterator[None]:
    """While open, SIGTERM raises KeyboardInterrupt, as Ctrl-C does."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """While open, no other comparison may write to the folder.

    Raises
    ------
    FedFusionError
        If one does.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as problem:
            raise FedFusionError(
                f"another comparison is writing to '{folder}': wait for it, end it, or choose "
                "another --output"
            ) from problem
        yield


def main(arguments: list[str]) -> int:
    """Do the job; 1 if it failed."""
    job = Path(arguments[0])
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        result: Row = {"row": work(**json.loads(job.read_text(encoding="utf-8")))}
    except FedFusionError as problem:
        result = {"error": str(problem)}
    except Exception as problem:  # noqa: BLE001 - whatever it is, the others go on
        traceback.print_exc()
        result = {"error": f"{type(problem).__name__}: {problem}"}
    write_text(job.with_name(RESULT), json.dumps(result))
    return int("error" in result)


def work(kind: str, **arguments: Any) -> Row:
    """Do what a job says."""
    # Here, not above: the process that starts jobs needs neither.
    from fedfusion_flwr.experiments.centralized import train_centralized
    from fedfusion_flwr.experiments.federated import run_cell

    return run_cell(**arguments) if kind == "cell" else train_centralized(**arguments)


def _end_with_parent() -> None:
    sys.stdin.read()
    os._exit(1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
