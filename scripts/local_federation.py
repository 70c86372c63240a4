# SPDX-License-Identifier: Apache-2.0
"""A federation on this machine: real processes, TLS and SuperNode authentication.

Used by ``scripts/local-federation`` and the deployment tests.
"""

from __future__ import annotations

import functools
import http.client
import json
import os
import re
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from scripts.certificates import create_server_certificate, create_supernode_key
from scripts.programs import (
    HOST,
    MARK,
    FederationError,
    Program,
    find_program,
    free_port,
    kill_marked,
    stop,
)

APP = Path(__file__).parents[1]
PROFILE = "local-federation"
"""Name of the federation's connection in Flower's configuration."""

START_TIMEOUT = 120.0
"""Seconds that a program may take to start, even on a busy machine."""

Value = str | int | float | bool


class LocalFederation:
    """A SuperLink and its SuperNodes on loopback; a context manager that stops them all.

    Each program has its own Flower home, as on separate machines.

    Parameters
    ----------
    folder : Path
        Holds certificates, keys, database, Flower homes and logs.
    num_supernodes : int
        How many to register and start; SuperNode i serves partition i.
    port : int or None
        Port of the SuperLink; None takes a free one.

    Attributes
    ----------
    supernodes : dict[int, Program]
        Those that should be running, by number. Methods that wait raise if one of them ends.
    """

    def __init__(self, folder: Path, num_supernodes: int = 3, port: int | None = None) -> None:
        self.folder = folder.resolve()
        self.num_supernodes = num_supernodes
        self.superlink: Program | None = None
        self.supernodes: dict[int, Program] = {}
        self._port = port
        self._programs: list[Program] = []
        self._keys: dict[int, Path] = {}

    def __enter__(self) -> LocalFederation:
        try:
            self.prepare()
            self.start_superlink()
            for number in range(self.num_supernodes):
                self.register(number)
            for number in range(self.num_supernodes):
                self.start_supernode(number)
            self.wait_for_supernodes()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def prepare(self) -> None:
        """Create the certificates and the configuration of the ``flwr`` command."""
        self.certificate = create_server_certificate(
            self.folder / "certificates", [HOST, "localhost"]
        )
        self.port = self._port or free_port()
        self.address = f"{HOST}:{self.port}"
        home = self.folder / "flwr-home"
        home.mkdir(parents=True, exist_ok=True)
        (home / "config.toml").write_text(
            f'[superlink]\ndefault = "{PROFILE}"\n\n[superlink.{PROFILE}]\n'
            f"address = {json.dumps(self.address)}\n"
            f"root-certificates = {json.dumps(str(self.certificate.authority))}\n",
            encoding="utf-8",
        )

    def environment(self, home: str) -> dict[str, str]:
        """Environment variables of one program, with its own Flower home."""
        return {
            **os.environ,
            # Flower finds its other programs by name, even if no environment is active.
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
            "FLWR_HOME": str(self.folder / home),
            "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "FLWR_TELEMETRY_ENABLED": "0",
            MARK: str(self.folder),
        }

    def start_superlink(self) -> None:
        """Start the SuperLink, or restart it with its database, and wait until it answers."""
        self.superlink = self._start(
            "superlink",
            "flower-superlink",
            *("--ssl-ca-certfile", self.certificate.authority),
            *("--ssl-certfile", self.certificate.certificate),
            *("--ssl-keyfile", self.certificate.key),
            "--enable-supernode-auth",
            *("--host", HOST, "--port", self.port),
            *("--database", self.folder / "superlink.db"),
        )
        self.wait_until(self._answers, START_TIMEOUT, "the SuperLink answers")

    def register(self, number: int) -> str:
        """Create and register a SuperNode's key; return the node id."""
        private, public = create_supernode_key(self.folder / "keys", f"supernode-{number}")
        self._keys[number] = private
        answer = self.flwr("supernode", "register", str(public), PROFILE, "--format", "json")
        return str(answer["node-id"])

    def start_supernode(self, number: int, **node_config: Value) -> Program:
        """Start a SuperNode; the SuperLink refuses one that was never registered.

        Parameters
        ----------
        number : int
            Number of its partition and its key.
        **node_config
            More keys of its node config.
        """
        if number not in self._keys:
            self._keys[number], _ = create_supernode_key(self.folder / "keys", str(number))
        partition = {"partition-id": number, "num-partitions": self.num_supernodes}
        program = self._start(
            f"supernode-{number}",
            "flower-supernode",
            *("--root-certificates", self.certificate.authority),
            *("--auth-supernode-private-key", self._keys[number]),
            *("--superlink", self.address, "--port", free_port()),
            *("--node-config", config_text({**partition, **node_config})),
        )
        self.supernodes[number] = program
        return program

    def wait_for_supernodes(self) -> None:
        """Wait until the SuperLink has accepted every SuperNode."""
        for number, program in self.supernodes.items():
            accepted = functools.partial(is_accepted, program)
            self.wait_until(accepted, START_TIMEOUT, f"SuperNode {number} is accepted")

    def kill_supernode(self, number: int) -> None:
        """Kill a SuperNode and its ClientApp, as a power cut would."""
        self.supernodes.pop(number).kill()

    def kill_superlink(self) -> None:
        """Kill the SuperLink and its ServerApp, as a power cut would."""
        if self.superlink is not None:
            self.superlink.kill()
            self.superlink = None

    def submit(self, run_config: Mapping[str, Value], app: Path = APP) -> str:
        """Start a run of an app; return its id."""
        arguments = "--run-config", config_text(run_config), "--format", "json"
        return str(self.flwr("run", str(app), PROFILE, *arguments)["run-id"])

    def stream(self, run_config: Mapping[str, Value]) -> tuple[str, str]:
        """Start a run and print its log until it ends; return the run's id and the log."""
        arguments = "--stream", "--run-config", config_text(run_config)
        program = self._start("run", "flwr", "run", APP, PROFILE, *arguments, home="flwr-home")
        shown, ended = 0, False
        while not ended:
            ended = program.wait(0.2)
            output = program.output()
            # Print whole lines: the last one may end within a character.
            complete = len(output) if ended else output.rfind("\n") + 1
            sys.stdout.write(output[shown:complete])
            sys.stdout.flush()
            shown = complete
            self.check()
        started = re.search(r"Successfully started run (\d+)", output)
        if started is None:
            raise FederationError(f"`flwr run` started nothing:\n{program.tail()}")
        return started.group(1), output

    def status(self, run_id: str) -> tuple[str, str]:
        """Return a run's status, such as ``finished:completed``, and its details."""
        answer = self.flwr("list", PROFILE, "--run-id", run_id, "--format", "json")
        run = answer["runs"][0]
        return str(run["status"]), str(run["status-details"])

    def wait_for_run(self, run_id: str, timeout: float) -> tuple[str, str]:
        """Wait for the end of a run; return its status and details."""
        deadline = time.monotonic() + timeout
        while not (found := self.status(run_id))[0].startswith("finished"):
            self.check()
            if time.monotonic() > deadline:
                raise FederationError(f"run {run_id} is still {found[0]} after {timeout:g} s")
            time.sleep(1.0)
        return found

    def flwr(self, *arguments: str) -> dict[str, Any]:
        """Run a ``flwr`` command; return its JSON answer."""
        done = subprocess.run(
            [find_program("flwr"), *arguments],
            env=self.environment("flwr-home"),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=START_TIMEOUT,
            check=False,
        )
        try:
            answer: dict[str, Any] = json.loads(done.stdout)
        except json.JSONDecodeError:
            answer = {}
        if not answer.get("success"):
            said = answer.get("error-message") or done.stdout + done.stderr
            raise FederationError(f"`flwr {' '.join(arguments[:2])}` failed: {said.strip()}")
        return answer

    def check(self) -> None:
        """Raise `FederationError` if a program that should be running has ended."""
        for program in (self.superlink, *self.supernodes.values()):
            if program is not None and program.exit_code is not None:
                raise FederationError(
                    f"{program.name} ended unexpectedly with exit code {program.exit_code}; "
                    f"the end of {program.log}:\n{program.tail()}"
                )

    def wait_until(self, condition: Callable[[], bool], timeout: float, what: str) -> None:
        """Wait until a condition holds, while every program keeps running.

        Raises
        ------
        FederationError
            If a program ends, or the condition does not hold in time.
        """
        deadline = time.monotonic() + timeout
        while not condition():
            self.check()
            if time.monotonic() > deadline:
                raise FederationError(f"still not so after {timeout:g} s: {what}")
            time.sleep(0.2)

    def stop(self) -> None:
        """Stop everything, SuperNodes first, so that they can sign off."""
        programs, self._programs = self._programs, []
        stop(program for program in programs if program is not self.superlink)
        stop(program for program in programs if program is self.superlink)
        self.superlink, self.supernodes = None, {}
        kill_marked(str(self.folder))

    def _start(
        self, name: str, command: str, *arguments: object, home: str | None = None
    ) -> Program:
        words = [find_program(command), *map(str, arguments)]
        program = Program(name, words, self.environment(home or f"{name}-home"), self.folder)
        self._programs.append(program)
        return program

    def _answers(self) -> bool:
        context = ssl.create_default_context(cafile=self.certificate.authority)
        connection = http.client.HTTPSConnection(HOST, self.port, timeout=5, context=context)
        try:
            connection.request("GET", "/health")
            return connection.getresponse().status == http.HTTPStatus.OK
        except OSError:
            return False
        finally:
            connection.close()


def is_accepted(supernode: Program) -> bool:
    """Whether the SuperLink has accepted a SuperNode."""
    return "SuperNode ID" in supernode.output()


def config_text(config: Mapping[str, Value]) -> str:
    """Format key=value pairs as Flower's commands read them."""
    return " ".join(f"{key}={json.dumps(value)}" for key, value in config.items())
