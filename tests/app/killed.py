# SPDX-License-Identifier: Apache-2.0
"""Runs in separate processes that are killed at a call of a chosen number.

Every call that the package's code makes is counted, of functions and of built-ins such as
`os.replace`: a number stands for a point of the run, whatever the clock, and can hit any point.
"""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import FrameType
from typing import Any

PACKAGE = str(Path(__file__).parents[2] / "fedfusion_flwr")

_processes = multiprocessing.get_context("forkserver")
# Imported once, in a process that does nothing else; the runs are its forks. The list includes what
# runs import later.
_processes.set_forkserver_preload(
    ["tests.runs", "torch._dynamo", "flwr_datasets", "sklearn.cluster", "sklearn.decomposition"]
)


@dataclass
class Calls:
    """Counts calls; ``resumable`` is the number at which the first checkpoint was written."""

    dies_at: int | None = None
    made: int = 0
    resumable: int | None = None

    def __call__(self, frame: FrameType, event: str, argument: object) -> None:
        """See one event of `sys.setprofile`."""
        if not frame.f_code.co_filename.startswith(PACKAGE):
            return
        if event in ("call", "c_call"):
            self.made += 1
            if self.made == self.dies_at:
                os.kill(os.getpid(), signal.SIGKILL)
        elif frame.f_code.co_name == "write_checkpoint" and event == "return":
            self.resumable = self.resumable or self.made


def to_its_end(config: dict[str, Any], seed: int) -> str:
    """A run that is not killed; its digest."""
    from tests.runs import run_in_process

    return run_in_process(config, seed).digest


def counted(config: dict[str, Any], seed: int, dies_at: int | None = None) -> tuple[str, Calls]:
    """A run to its end, unless it is killed; its digest and its calls."""
    from tests.runs import run_in_process

    calls = Calls(dies_at)
    sys.setprofile(calls)
    try:
        outcome = run_in_process(config, seed)
    finally:
        sys.setprofile(None)
    return outcome.digest, calls


def dying_when(name: str, path_part: str, config: dict[str, Any]) -> None:
    """A run that is killed before it calls ``os.<name>`` for a file with this in its path."""
    from tests.runs import run_in_process

    call = getattr(os, name)

    def die(target: int | str, *rest: Any) -> Any:
        path = os.readlink(f"/proc/self/fd/{target}") if isinstance(target, int) else str(target)
        if path_part in path:
            os.kill(os.getpid(), signal.SIGKILL)
        return call(target, *rest)

    setattr(os, name, die)
    run_in_process(config)


def with_file_limit(limit: int, after_round: int, config: dict[str, Any]) -> str:
    """A run whose files the system limits to this many bytes from a round on."""
    from fedfusion_flwr.tracking import RunLog
    from tests.runs import run_in_process

    note = RunLog.on_round_end

    def limited(self: RunLog, report: Any) -> None:
        note(self, report)
        if report.server_round == after_round:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    RunLog.on_round_end = limited  # type: ignore[method-assign]
    return run_in_process(config).digest


def in_a_process(work: Callable[..., Any], *arguments: Any) -> tuple[int | None, Any]:
    """Call a function of this module in a new process: its exit code, and what it returned."""
    mine, theirs = _processes.Pipe(duplex=False)
    process: BaseProcess = _processes.Process(target=_call, args=(theirs, work, arguments))
    process.start()
    theirs.close()
    try:
        result = mine.recv()
    except EOFError:
        result = None
    process.join(60)
    return process.exitcode, result


def _call(pipe: Any, work: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    pipe.send(work(*arguments))
