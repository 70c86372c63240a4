# SPDX-License-Identifier: Apache-2.0
"""Programs that run beside this one: started with a log file of their own, and surely ended."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path

MARK = "FEDFUSION_LOCAL_FEDERATION"
"""Environment variable by which everything that a federation started is found again."""

HOST = "127.0.0.1"


class FederationError(RuntimeError):
    """Something of the federation failed; one message with the end of the log that tells why."""


class Program:
    """A program in a process group of its own; its output goes to a file.

    Parameters
    ----------
    name : str
        For messages and the log's name.
    command : list[str]
        What to run.
    environment : Mapping[str, str]
        All of it.
    folder : Path
        Where ``<name>.log`` is written; an earlier one of that name is added to.
    """

    def __init__(
        self, name: str, command: list[str], environment: Mapping[str, str], folder: Path
    ) -> None:
        self.name = name
        self.log = folder / f"{name}.log"
        self._offset = self.log.stat().st_size if self.log.exists() else 0
        with self.log.open("ab") as output:
            self._process = subprocess.Popen(
                command,
                env=dict(environment),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def exit_code(self) -> int | None:
        """None while it runs; negative after a signal."""
        return self._process.poll()

    def output(self) -> str:
        """What it wrote, without what an earlier program of its name wrote."""
        with self.log.open("rb") as file:
            file.seek(self._offset)
            return file.read().decode(errors="replace")

    def tail(self, lines: int = 15) -> str:
        """The last lines of its output."""
        return "\n".join(self.output().rstrip().splitlines()[-lines:])

    def send(self, number: signal.Signals) -> None:
        """Signal the program and what it started; one that is gone is left in peace."""
        if self.exit_code is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, number)

    def kill(self) -> None:
        """End it and what it started without a chance to say good-bye, as a power cut would."""
        self.send(signal.SIGKILL)
        self._process.wait()

    def wait(self, seconds: float) -> bool:
        """Whether it ended by itself in time."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(max(0.0, seconds))
        return self.exit_code is not None


def stop(programs: Iterable[Program], seconds: float = 10.0) -> None:
    """Ask all programs at once to end, also halted ones; kill those that do not in time."""
    programs = list(programs)
    for program in programs:
        program.send(signal.SIGTERM)
        program.send(signal.SIGCONT)
    deadline = time.monotonic() + seconds
    for program in programs:
        if not program.wait(deadline - time.monotonic()):
            program.kill()


def marked(mark: str) -> list[int]:
    """Process ids with ``mark`` in their environment; none where there is no ``/proc``."""
    wanted = f"{MARK}={mark}".encode()
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if wanted in (folder / "environ").read_bytes().split(b"\0"):
                found.append(int(folder.name))
    return sorted(set(found) - {os.getpid()})


def kill_marked(mark: str, seconds: float = 5.0) -> None:
    """End what left its process group: Flower detaches some of its helpers.

    They end by themselves when their parent did, so most often nothing is left to kill.
    """
    deadline = time.monotonic() + seconds
    while (left := marked(mark)) and time.monotonic() < deadline:
        time.sleep(0.1)
    for process in left:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)


def find_program(name: str) -> str:
    """A program of the Python environment that runs this."""
    path = Path(sys.executable).with_name(name)
    if not path.exists():
        raise FederationError(f"{path} is missing; run this with an environment that has flwr")
    return str(path)


def free_port() -> int:
    """A loopback port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])
