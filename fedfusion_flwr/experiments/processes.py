# SPDX-License-Identifier: Apache-2.0
"""Jobs in processes of their own, some side by side."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from fedfusion_flwr.experiments.cell import RESULT
from fedfusion_flwr.experiments.rows import Row, write_text

JOB, LOG = "job.json", "log.txt"
_GRACE_SECONDS = 10


@dataclass(frozen=True)
class Job:
    """What one process is to do.

    Attributes
    ----------
    id : str
        For messages.
    arguments : dict[str, Any]
        ``kind`` and its arguments; see `experiments.cell`.
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
        command = [sys.executable, "-m", "fedfusion_flwr.experiments.cell"]
        with (job.folder / LOG).open("wb") as log:
            self.process = subprocess.Popen(
                [*command, str(job.folder / JOB)],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={"OMP_NUM_THREADS": "1", "FLWR_TELEMETRY_ENABLED": "0", **os.environ},
                # So that Ctrl-C reaches this process only, which then ends the others.
                start_new_session=True,
            )

    @property
    def ended(self) -> bool:
        return self.process.poll() is not None

    def result(self) -> Row:
        """What the process wrote; or what became of it."""
        self.close()
        path = self.job.folder / RESULT
        if path.exists():
            result: Row = json.loads(path.read_text(encoding="utf-8"))
            return result
        code = self.process.returncode
        how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        return {"error": f"its process ended with {how}; see {self.job.folder / LOG}"}

    def stop(self) -> None:
        """End the process and what it has started."""
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

    Closing the iterator, and any exception where it is used, ends the running ones.

    Yields
    ------
    tuple[Job, Row]
        The job and ``{"row": ...}`` or ``{"error": sentence}``.
    """
    waiting, running = iter(jobs), list[_Running]()
    exhausted = False
    try:
        while running or not exhausted:
            while len(running) < workers and not exhausted:
                job = next(waiting, None)
                if job is None:
                    exhausted = True
                else:
                    running.append(_Running(job))
            for ended in [one for one in running if one.ended]:
                running.remove(ended)
                yield ended.job, ended.result()
            if running:
                time.sleep(0.1)
    finally:
        for one in running:
            one.close()
        for one in running:
            one.stop()


@contextlib.contextmanager
def interrupted_by_sigterm() -> Iterator[None]:
    """While open, SIGTERM is what Ctrl-C is: a KeyboardInterrupt."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
