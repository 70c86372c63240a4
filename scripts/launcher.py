# SPDX-License-Identifier: Apache-2.0
"""The command line of ``scripts/local-federation``."""

from __future__ import annotations

import argparse
import re
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import NoReturn

from click import ClickException
from flwr.common.config import parse_config_args

from scripts.local_federation import APP, PROFILE, LocalFederation, Value
from scripts.programs import FederationError

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Interrupted(BaseException):
    """A signal asked the program to end; like `KeyboardInterrupt`, not an error."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one federation; return 0 only if the run completed."""
    options = _parser().parse_args(arguments)
    for number in SIGNALS:
        signal.signal(number, _interrupt)
    folder = None
    try:
        run_config = _run_config(options)
        folder = _work_folder(options.workdir)
        print(f"Work folder: {folder}", flush=True)
        with LocalFederation(folder, options.nodes, options.port) as federation:
            print(f"SuperLink at {federation.address}, {options.nodes} SuperNodes online")
            if options.up:
                _stay(federation)
            return _run(federation, run_config)
    except FederationError as problem:
        print(f"local-federation: {problem}", file=sys.stderr)
        return 1
    except Interrupted as asked:
        print(f"Ended by {signal.Signals(asked.number).name}", file=sys.stderr)
        return 128 + asked.number
    finally:
        if folder is not None and not (options.keep or options.workdir):
            shutil.rmtree(folder, ignore_errors=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="local-federation",
        description="Run the app on a local SuperLink and SuperNodes with TLS and SuperNode "
        "authentication, then stop them all.",
    )
    parser.add_argument(
        "--nodes", type=_positive, default=3, help="SuperNodes to start (default: 3)"
    )
    parser.add_argument(
        "--rounds", type=_positive, default=3, help="rounds of the run (default: 3)"
    )
    parser.add_argument(
        "--run-config",
        action="append",
        default=[],
        metavar="'KEY=VALUE ...'",
        help='keys of the run, as for `flwr run`; default: num-clients=NODES partition="iid"',
    )
    parser.add_argument(
        "--port", type=_positive, help="port of the SuperLink (default: a free one)"
    )
    parser.add_argument(
        "--workdir",
        type=Path,
        help="new or empty folder for certificates, keys, database and logs, which is kept "
        "(default: a temporary folder)",
    )
    parser.add_argument("--keep", action="store_true", help="keep the temporary folder")
    parser.add_argument(
        "--up",
        action="store_true",
        help="start no run: print the commands that start one and wait for Ctrl-C",
    )
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return value


def _interrupt(number: int, _: FrameType | None) -> NoReturn:
    # A second Ctrl-C must not interrupt the clean-up.
    for other in SIGNALS:
        signal.signal(other, signal.SIG_IGN)
    raise Interrupted(number)


def _run_config(options: argparse.Namespace) -> dict[str, Value]:
    try:
        overrides = parse_config_args(options.run_config)
    except (ClickException, ValueError) as problem:
        raise FederationError(f"--run-config: {problem}") from problem
    return {
        "num-server-rounds": options.rounds,
        "num-clients": options.nodes,
        "partition": "iid",
        **overrides,
    }


def _work_folder(wanted: Path | None) -> Path:
    if wanted is None:
        return Path(tempfile.mkdtemp(prefix="local-federation-"))
    try:
        wanted.mkdir(parents=True, exist_ok=True)
        if any(wanted.iterdir()):
            raise FederationError(f"--workdir '{wanted}' is not empty; name a new folder")
    except OSError as problem:
        raise FederationError(f"--workdir '{wanted}': {problem.strerror}") from problem
    return wanted.resolve()


def _run(federation: LocalFederation, run_config: dict[str, Value]) -> int:
    run_id, output = federation.stream(run_config)
    status, details = federation.wait_for_run(run_id, timeout=float("inf"))
    found = re.findall(r"Run directory: (.+?)\s*$", output, re.MULTILINE)
    print(f"Run {run_id}: {status}" + ("" if details == "N/A" else f" ({details})"))
    print(f"Artifacts: {found[-1] if found else 'none'}")
    return 0 if status == "finished:completed" else 1


def _stay(federation: LocalFederation) -> NoReturn:
    home = federation.environment("flwr-home")["FLWR_HOME"]
    config = f'num-clients={federation.num_supernodes} partition="iid"'
    print(
        f"""Logs: {federation.folder}/*.log
Use it from an environment with flwr; Ctrl-C here ends it:
  export FLWR_HOME={home}
  flwr run {APP} {PROFILE} --stream --run-config '{config}'
  flwr list {PROFILE}
  flwr supernode list {PROFILE}""",
        flush=True,
    )
    while True:
        federation.check()
        time.sleep(1.0)
