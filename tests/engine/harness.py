# SPDX-License-Identifier: Apache-2.0
"""Starts real `flwr run`s on a SuperLink of our own, beside any that the user has running."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedfusion_flwr.experiments.rows import read_rows
from scripts.programs import free_port
from tests.engine.parts import PARTS

ROOT = Path(__file__).parents[2]
PATIENCE = 1500
"""Seconds that a run of many parts may take on a busy machine."""


@dataclass(frozen=True)
class EngineRun:
    """One finished run: Flower's status of it, its log and its artifacts."""

    status: str
    log: str
    directory: Path

    def metrics(self) -> list[dict[str, Any]]:
        return read_rows(self.directory / "metrics.jsonl")

    def clients(self) -> list[dict[str, Any]]:
        return read_rows(self.directory / "clients.jsonl")

    @property
    def digest(self) -> str:
        found = re.search(r"Final model digest: ([0-9a-f]{64})", self.log)
        assert found, self.log[-3000:]
        return found.group(1)

    def part(self, name: str) -> EngineRun:
        """One of the runs of `Engine.run_parts`; what its clients say may come too late."""
        name_ = re.escape(name)
        found = re.search(
            rf"Part {name_} begins(.*?)(?:Part {name_} (\w+)|\Z)", self.log, re.DOTALL
        )
        assert found, self.log[-3000:]
        status = f"finished:{found[2]}" if found[2] else self.status
        return EngineRun(status, found[1], self.directory / name)


class Engine:
    """`flwr run` against a SuperLink of our own.

    A run takes some 40 seconds of CPU time before its first round, mostly for imports: 10 for the
    server, 8 for each actor, 10 for Ray. So runs have one actor, and tests are parts of one run.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.home = folder / "flwr-home"
        self.app = copy_of_app(folder)
        self.counter = itertools.count(1)
        self.orphans: set[int] = set()
        self.environment = {
            **os.environ,
            # Flower finds its other programs by name, even if no environment is active.
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "FLWR_HOME": str(self.home),
            "FEDFUSION_CACHE": str(folder / "cache"),
            "FLWR_LOCAL_SUPERLINK_HTTP_API_PORT": str(free_port()),
            "FLWR_LOCAL_CONTROL_API_PORT": str(free_port()),
            "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
            "FLWR_TELEMETRY_ENABLED": "0",
        }

    def run(
        self,
        config: dict[str, Any],
        *,
        app: Path | None = None,
        supernodes: int = 10,
        actors: int = 1,
    ) -> EngineRun:
        """Run an app, ours by default, to its end in a new run directory."""
        overrides = config if "output-dir" in config else {"output-dir": self._new(), **config}
        log = self._flwr(
            "run",
            str(app or self.app),
            "--stream",
            "--federation-config",
            f"num-supernodes={supernodes} client-resources-num-cpus=1 init-args-num-cpus={actors}",
            "--run-config",
            " ".join(f"{key}={json.dumps(value)}" for key, value in overrides.items()),
        )
        started = re.search(r"started run (\d+)", log)
        assert started, log
        return EngineRun(self._status(started[1]), log, Path(str(overrides["output-dir"])))

    def run_parts(
        self,
        parts: Mapping[str, dict[str, Any]],
        *,
        app: Path | None = None,
        supernodes: int = 10,
    ) -> EngineRun:
        """Make several runs, by name, in one `flwr run` of an app with `tests.engine.parts`."""
        directory = Path(self._new())
        directory.mkdir()
        (directory / PARTS).write_text(json.dumps(parts), encoding="utf-8")
        if app is None:
            app = self.folder / "parts" / "app"
            if not app.exists():
                copy_of_app(app.parent, server="parts:server", client="parts:client")
        return self.run({"output-dir": str(directory)}, app=app, supernodes=supernodes)

    def _new(self) -> str:
        return str(self.folder / f"run-{next(self.counter)}")

    def _status(self, run_id: str) -> str:
        for _ in range(60):
            answer = json.loads(self._flwr("list", "--run-id", run_id, "--format", "json"))
            run = answer["runs"][0]
            if run["status"].startswith("finished"):
                return str(run["status"])
            time.sleep(0.5)
        raise AssertionError(f"run {run_id} did not finish: {run}")

    def _flwr(self, *arguments: str) -> str:
        done = subprocess.run(
            [str(Path(sys.executable).with_name("flwr")), *arguments],
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=PATIENCE,
            check=False,
        )
        return done.stdout

    def kill_server(self) -> None:
        """SIGKILL the process of the run in progress, in which the ServerApp is."""
        port = self.environment["FLWR_LOCAL_SUPERLINK_HTTP_API_PORT"]
        (server,) = _pgrep("-f", rf"flwr-simulation .*127\.0\.0\.1:{port}\b")
        # Some of Ray's processes do not notice that it is gone.
        self.orphans |= _descendants(server)
        os.kill(server, signal.SIGKILL)

    def stop(self) -> None:
        """End the SuperLink that the first run started, and orphans; nothing else does."""
        for pid in self.orphans & set(_pgrep("-f", "/ray/")):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for pid in _pgrep("-f", f"flower-superlink.*{re.escape(str(self.home))}"):
            os.kill(pid, signal.SIGTERM)


def copy_of_app(
    folder: Path,
    modules: Mapping[str, str] | None = None,
    *,
    server: str = "server_app:app",
    client: str = "client_app:app",
) -> Path:
    """Copy the app's sources to ``folder / "app"``: without tests, results and environments.

    Sources of ``modules`` are put beside them, as is `tests.engine.parts`. Another server or client
    needs a module of another name: an installed one would be found before the copy's.
    """
    app = folder / "app"
    app.mkdir(parents=True)
    for name in ("README.md", "LICENSE", "client_app.py", "server_app.py"):
        shutil.copy(ROOT / name, app / name)
    shutil.copy(Path(__file__).with_name("parts.py"), app)
    for name, source in (modules or {}).items():
        (app / f"{name}.py").write_text(source, encoding="utf-8")
    skip = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "fedfusion_flwr", app / "fedfusion_flwr", ignore=skip)
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    for ours, theirs in (("server_app:app", server), ("client_app:app", client)):
        assert text.count(ours) == 1
        text = text.replace(ours, theirs)
    (app / "pyproject.toml").write_text(text, encoding="utf-8")
    return app


def _pgrep(*arguments: str) -> list[int]:
    command = ["pgrep", *arguments]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    return [int(pid) for pid in found.stdout.split()]


def _descendants(pid: int) -> set[int]:
    children = set(_pgrep("-P", str(pid)))
    return children.union(*(_descendants(child) for child in children))
