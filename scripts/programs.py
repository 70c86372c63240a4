# SPDX-License-Identifier: Apache-2.0
"""Child programs: each has a log file, and all of them are stopped in the end."""

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
"""Environment variable that marks every process of a federation."""

HOST = "127.0.0.1"


class FederationError(RuntimeError):
    """A part of the federation failed; the message ends with the end of its log."""


class Program:
    """A program in its own process group; its output goes to a file.

    Parameters
    ----------
    name : str
        Used in messages and in the name of the log.
    command : list[str]
        The program and its arguments.
    environment : Mapping[str, str]
        All its environment variables.
    folder : Path
        Holds ``<name>.log``; an existing log is appended to.
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
        """Exit code; None while the program runs, negative after a signal."""
        return self._process.poll()

    def output(self) -> str:
        """Output of this program, without that of earlier ones with the same log."""
        with self.log.open("rb") as file:
            file.seek(self._offset)
            return file.read().decode(errors="replace")

    def tail(self, lines: int = 15) -> str:
        """Last lines of the output."""
        return "\n".join(self.output().rstrip().splitlines()[-lines:])

    def send(self, number: signal.Signals) -> None:
        """Send a signal to the program and its children, if it still runs."""
        if self.exit_code is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, number)

    def kill(self) -> None:
        """Kill the program and its children at once, as a power cut would."""
        self.send(signal.SIGKILL)
        self._process.wait()

    def wait(self, seconds: float) -> bool:
        """Wait for the program to end; return whether it ended in time."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(max(0.0, seconds))
        return self.exit_code is not None


def stop(programs: Iterable[Program], seconds: float = 10.0) -> None:
    """Ask all programs to end, halted ones too; kill those that are not gone in time."""
    programs = list(programs)
    for program in programs:
        program.send(signal.SIGTERM)
        program.send(signal.SIGCONT)
    deadline = time.monotonic() + seconds
    for program in programs:
        if not program.wait(deadline - time.monotonic()):
            program.kill()


def marked(mark: str) -> list[int]:
    """Return the process ids with ``mark`` in their environment; needs ``/proc``."""
    wanted = f"{MARK}={mark}".encode()
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if wanted in (folder / "environ").read_bytes().split(b"\0"):
                found.append(int(folder.name))
    return sorted(set(found) - {os.getpid()})


def kill_marked(mark: str, seconds: float = 5.0) -> None:
    """Kill marked processes that have left their process group, as some of Flower's helpers do.

    They get ``seconds`` to end by themselves after their parent.
    """
    deadline = time.monotonic() + seconds
    while (left := marked(mark)) and time.monotonic() < deadline:
        time.sleep(0.1)
    for process in left:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)


def find_program(name: str) -> str:
    """Path of a program in the current Python environment."""
    path = Path(sys.executable).with_name(name)
    if not path.exists():
        raise FederationError(f"{path} is missing; run this with an environment that has flwr")
    return str(path)


def free_port() -> int:
    """Return a loopback port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])
