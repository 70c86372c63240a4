# SPDX-License-Identifier: Apache-2.0
"""The suite `quick` as a user runs it: killed, gone on with, and through Flower's simulation."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fedfusion_flwr.app.local import SIMULATION
from fedfusion_flwr.cli import main
from fedfusion_flwr.experiments.federated import run_cell
from fedfusion_flwr.experiments.results import runs_table
from fedfusion_flwr.experiments.rows import Row, read_rows

pytestmark = [pytest.mark.slow, pytest.mark.engine]
TABLES = ("accuracy", "ranks", "differences", "target", "costs", "tuning")


def command(folder: Path) -> list[str]:
    return ["compare", "quick", "--output", str(folder), "--engine", "in-process"]


def processes_that_mention(text: str) -> list[int]:
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if text in (entry / "cmdline").read_bytes().decode(errors="replace"):
                found.append(int(entry.name))
        except OSError:
            continue
    return found


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Row], list[int]]:
    """The folder of a comparison that was killed, the rows it had then, and what outlived it."""
    folder = tmp_path_factory.mktemp("quick") / "results"
    program = [sys.executable, "-m", "fedfusion_flwr.cli", *command(folder)]
    process = subprocess.Popen(program, stdout=subprocess.DEVNULL)
    while len(read_rows(folder / "tune.jsonl")) < 2:
        assert process.poll() is None
        time.sleep(0.2)
    process.send_signal(signal.SIGKILL)
    process.wait()
    rows = read_rows(folder / "tune.jsonl")
    for _ in range(100):
        if not processes_that_mention(str(folder)):
            break
        time.sleep(0.2)
    return folder, rows, processes_that_mention(str(folder))


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="reads /proc")
def test_a_killed_comparison_leaves_no_process(killed: tuple[Path, list[Row], list[int]]) -> None:
    assert killed[2] == []


def test_it_goes_on_where_it_stopped_and_makes_all_tables(
    killed: tuple[Path, list[Row], list[int]],
) -> None:
    folder, before, _ = killed
    assert main(command(folder)) == 0
    assert read_rows(folder / "tune.jsonl")[: len(before)] == before
    rows = read_rows(folder / "cells.jsonl")
    assert len(rows) == len({row["cell"] for row in rows}) == 10
    for name in TABLES:
        for suffix in ("md", "csv", "json"):
            assert (folder / "tables" / f"{name}.{suffix}").stat().st_size > 0
    # Equal budgets: as many gradient steps, whatever a round is.
    steps = {row["seed"]: set() for row in rows}
    for row in rows:
        run = runs_table([row])[0].iloc[0]
        steps[row["seed"]].add(run["client-steps"])
        assert row["bias"]["references"]
    assert all(len(found) == 1 for found in steps.values())
    references = read_rows(folder / "centralized.jsonl")
    assert [row["steps"] for row in references] == [*steps[0], *steps[0]]
    for row in references:
        assert (folder / row["model_file"]).exists()


def test_simulation_has_the_same_digest(
    killed: tuple[Path, list[Row], list[int]], tmp_path: Path
) -> None:
    rows = read_rows(killed[0] / "cells.jsonl")
    row = next(row for row in rows if row["strategy"] == "fedfusion")
    config = {**row["config"], "output-dir": str(tmp_path / "run")}
    again = run_cell(config, SIMULATION, cpus=os.cpu_count() or 1, gpus=0.0)
    assert again["digest"] == row["digest"]
    assert again["engine"] == "simulation"
    assert again["metrics"]["global-accuracy"] == row["metrics"]["global-accuracy"]
