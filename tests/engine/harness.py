# SPDX-License-Identifier: Apache-2.0
"""Starts real `flwr run`s, apart from any SuperLink that the user may have running."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class EngineRun:
    """One finished run: the status that Flower keeps of it, its log and its artifacts."""

    status: str
    details: str
    log: str
    directory: Path

    def metrics(self) -> list[dict[str, Any]]:
        return self._rows("metrics.jsonl")

    def clients(self) -> list[dict[str, Any]]:
        return self._rows("clients.jsonl")

    @property
    def digest(self) -> str:
        found = re.search(r"Final model digest: ([0-9a-f]{64})", self.log)
        assert found, self.log[-3000:]
        return found.group(1)

    def _rows(self, name: str) -> list[dict[str, Any]]:
        text = (self.directory / name).read_text(encoding="utf-8")
        return [json.loads(line) for line in text.splitlines()]


class Engine:
    """`flwr run` against a SuperLink of our own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.home = folder / "flwr-home"
        self.count = 0
        self.orphans: set[int] = set()
        first, second = _free_ports(2)
        self.environment = {
            **os.environ,
            # flwr looks its other programs up by name, also where the environment is not activated.
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "FLWR_HOME": str(self.home),
            "FEDFUSION_CACHE": str(folder / "cache"),
            "FLWR_LOCAL_SUPERLINK_HTTP_API_PORT": str(first),
            "FLWR_LOCAL_CONTROL_API_PORT": str(second),
            "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
            "FLWR_TELEMETRY_ENABLED": "0",
        }

    def run(
        self,
        config: dict[str, Any],
        *,
        app: Path = ROOT,
        supernodes: int = 10,
        cpus_per_client: int = 1,
    ) -> EngineRun:
        """Run the app to its end; the run directory is a fresh one."""
        self.count += 1
        directory = self.folder / f"run-{self.count}"
        overrides = {"output-dir": str(directory), **config}
        log = self._flwr(
            "run",
            str(app),
            "--stream",
            "--federation-config",
            f"num-supernodes={supernodes} client-resources-num-cpus={cpus_per_client}",
            "--run-config",
            " ".join(f"{key}={json.dumps(value)}" for key, value in overrides.items()),
        )
        started = re.search(r"started run (\d+)", log)
        assert started, log
        status, details = self._status(started.group(1))
        return EngineRun(status, details, log, directory)

    def _status(self, run_id: str) -> tuple[str, str]:
        for _ in range(60):
            answer = json.loads(self._flwr("list", "--run-id", run_id, "--format", "json"))
            run = answer["runs"][0]
            if run["status"].startswith("finished"):
                return run["status"], run["status-details"]
            time.sleep(0.5)
        raise AssertionError(f"run {run_id} did not finish: {run}")

    def _flwr(self, command: str, *arguments: str) -> str:
        flwr = Path(sys.executable).with_name("flwr")
        done = subprocess.run(
            [str(flwr), command, *arguments],
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=500,
            check=False,
        )
        return done.stdout

    def kill_server(self) -> None:
        """SIGKILL the process of the run in progress, in which the ServerApp is."""
        port = self.environment["FLWR_LOCAL_SUPERLINK_HTTP_API_PORT"]
        (server,) = _pgrep("-f", rf"flwr-simulation .*127\.0\.0\.1:{port}\b")
        # Ray's: some of them do not notice.
        self.orphans |= _descendants(server)
        os.kill(server, signal.SIGKILL)

    def stop(self) -> None:
        """End the SuperLink that the first run started, and orphans: nobody else does."""
        for pid in self.orphans & set(_pgrep("-f", "/ray/")):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for pid in _pgrep("-f", f"flower-superlink.*{re.escape(str(self.home))}"):
            os.kill(pid, signal.SIGTERM)


def copy_of_app(folder: Path) -> Path:
    """The app's sources in ``folder / "app"``, to put modules of one's own beside."""
    app = folder / "app"
    app.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE", "client_app.py", "server_app.py"):
        shutil.copy(ROOT / name, app / name)
    skip = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "fedfusion_flwr", app / "fedfusion_flwr", ignore=skip)
    return app


def _pgrep(*arguments: str) -> list[int]:
    command = ["pgrep", *arguments]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    return [int(pid) for pid in found.stdout.split()]


def _descendants(pid: int) -> set[int]:
    children = set(_pgrep("-P", str(pid)))
    return children.union(*(_descendants(child) for child in children))


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for s in sockets:
            s.bind(("127.0.0.1", 0))
        return [s.getsockname()[1] for s in sockets]
    finally:
        for s in sockets:
            s.close()
