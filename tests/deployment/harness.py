# SPDX-License-Identifier: Apache-2.0
"""A federation of real processes for the fault tests, and what its runs write."""

from __future__ import annotations

import itertools
import time
from pathlib import Path
from typing import Any

from fedfusion_flwr.experiments.rows import read_rows
from scripts.local_federation import APP, LocalFederation, Value, is_accepted
from scripts.programs import FederationError

PATIENCE = 600.0
"""Seconds to wait for what takes a few on an idle machine."""

RETURN_TIMEOUT = 180.0
"""Seconds; for up to 60 s Flower takes a vanished node for online and refuses its return."""

CONFIG: dict[str, Value] = {
    "num-clients": 3,
    "partition": "iid",
    "strategy": "fedavg",
    "fraction-evaluate": 0.0,
}


class Run:
    """A run: its id and what it has written so far."""

    def __init__(self, run_id: str, directory: Path) -> None:
        self.run_id = run_id
        self.directory = directory

    def metrics(self) -> list[dict[str, Any]]:
        """Rows of all rounds but round 0, which tests the untrained model."""
        return [row for row in read_rows(self.directory / "metrics.jsonl") if row["round"] > 0]

    def clients(self, server_round: int) -> dict[int | None, str]:
        """Each client's reply in a round: ``ok`` or why it was dropped."""
        return {
            row.get("client"): row.get("dropped", "ok")
            for row in read_rows(self.directory / "clients.jsonl")
            if row["round"] == server_round
        }


class Deployment(LocalFederation):
    """A federation with its runs in its folder; `heal` restarts what a test has stopped."""

    _count = itertools.count(1)

    def begin(self, app: Path = APP, **overrides: Value) -> Run:
        """Submit a run for three clients."""
        directory = self.folder / f"run-{next(self._count)}"
        keys = {key.replace("_", "-"): value for key, value in overrides.items()}
        run_id = self.submit({**CONFIG, "output-dir": str(directory), **keys}, app)
        return Run(run_id, directory)

    def finish(self, run: Run) -> str:
        """Wait for a run's end; return its status."""
        return self.wait_for_run(run.run_id, PATIENCE)[0]

    def wait_for_round(self, run: Run, number: int) -> None:
        """Wait until a round is over."""
        self.wait_until(
            lambda: len(run.metrics()) >= number, PATIENCE, f"round {number} of the run is over"
        )

    def trainings(self, number: int) -> int:
        """Count the train messages that a SuperNode has received since its start."""
        return self.supernodes[number].output().count("Receiving: train message")

    def wait_for_training(self, number: int, count: int) -> None:
        """Wait until a SuperNode has received that many train messages."""
        what = f"SuperNode {number} trains for the {count}th time"
        self.wait_until(lambda: self.trainings(number) >= count, PATIENCE, what)

    def bring_back(self, number: int) -> int:
        """Start a SuperNode until it is let in, as a supervisor would; return the refusals."""
        deadline = time.monotonic() + RETURN_TIMEOUT
        for refusals in itertools.count():
            self.start_supernode(number)
            program = self.supernodes.pop(number)
            while program.exit_code is None and not is_accepted(program):
                time.sleep(0.2)
            if program.exit_code is None:
                self.supernodes[number] = program
                return refusals
            if time.monotonic() > deadline:
                raise FederationError(f"SuperNode {number} is still refused:\n{program.tail()}")
        raise AssertionError("unreachable")

    def heal(self) -> None:
        """Start the SuperNodes that an earlier test has stopped."""
        for number in set(range(self.num_supernodes)) - set(self.supernodes):
            self.bring_back(number)
