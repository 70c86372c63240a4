# SPDX-License-Identifier: Apache-2.0
"""Jobs in processes of their own: how they end."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from fedfusion_flwr.experiments import jobs
from fedfusion_flwr.experiments.jobs import Job, interrupted_by_sigterm, run_jobs


def job(folder: Path, name: str, **arguments: Any) -> Job:
    return Job(name, {"kind": "cell", **arguments}, folder / name)


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The processes that were started, as they are."""
    found: list[Any] = []
    start = jobs._Running.__init__

    def remember(self: Any, job: Job) -> None:
        start(self, job)
        found.append(self.process)

    monkeypatch.setattr(jobs._Running, "__init__", remember)
    return found


def test_a_killed_process_is_a_failed_job(tmp_path: Path, started: list[Any]) -> None:
    def jobs() -> Any:
        yield job(tmp_path, "one")
        os.kill(started[0].pid, signal.SIGKILL)
        yield job(tmp_path, "two")

    results = run_jobs(jobs(), 2)
    first, result = next(results)
    results.close()
    assert first.id == "one"
    assert result["error"].startswith("its process ended with signal SIGKILL; see ")
    assert result["error"].endswith("log.txt")


def test_closing_ends_what_runs(tmp_path: Path, started: list[Any]) -> None:
    def jobs() -> Any:
        yield job(tmp_path, "one")
        yield job(tmp_path, "two")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        next(run_jobs(jobs(), 3))
    assert len(started) == 2
    assert all(process.poll() is not None for process in started)


def test_a_job_that_raises_says_what(tmp_path: Path) -> None:
    # No `config`: a mistake of the program, not of the user, and no reason to stop the others.
    (found,) = run_jobs([job(tmp_path, "one")], 1)
    assert found[1]["error"].startswith("TypeError: ")
    assert "Traceback" in (tmp_path / "one" / "log.txt").read_text()


def test_sigterm_is_an_interruption() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with interrupted_by_sigterm(), pytest.raises(KeyboardInterrupt):
        _terminate_this_process()
    assert signal.getsignal(signal.SIGTERM) == before


def _terminate_this_process() -> None:
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(1)  # The handler runs here.
