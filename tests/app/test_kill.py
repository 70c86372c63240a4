# SPDX-License-Identifier: Apache-2.0
"""The server's process is killed at any moment; the resumed run ends with the same model.

Real processes; `tests/engine/test_kill.py` does the same to a real `flwr run`.
"""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedfusion_flwr.app.server import RunOutcome
from fedfusion_flwr.strategies import registry
from tests.app.killed import counted, dying_when, in_a_process, to_its_end, with_file_limit
from tests.runs import CONFIG, ROUNDS, assert_same_artifacts, rows, run_in_process, write_pictures

KILLED = -signal.SIGKILL
QUICK = ("fesem",)
"""One with a single model and one with several; -m slow runs the others."""


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    path = write_pictures(tmp_path_factory.mktemp("data") / "pictures.npz")
    return {**CONFIG, "data-root": str(path)}


@pytest.fixture(scope="module")
def whole(config: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> RunOutcome:
    """The run that nothing has disturbed."""
    return run_in_process(in_folder(config, tmp_path_factory.mktemp("whole")))


def in_folder(config: dict[str, Any], folder: Path, **more: Any) -> dict[str, Any]:
    return {**config, "output-dir": str(folder), **more}


def checkpoints(folder: Path) -> list[str]:
    return sorted(path.stem for path in folder.glob("checkpoint-*"))


def left_behind(folder: Path) -> list[str]:
    """Files that were being written."""
    return [path.name for path in folder.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize(
    "strategy",
    [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in registry()],
)
def test_killed_twice_at_random_and_the_same_in_the_end(
    strategy: str, config: dict[str, Any], tmp_path: Path
) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    config = {**config, "strategy": strategy}
    code, (digest, calls) = in_a_process(counted, in_folder(config, whole), 0)
    assert code == 0
    assert calls.resumable is not None
    generator = np.random.default_rng([6, list(registry()).index(strategy)])
    # Not the last calls: caches make the number of calls differ a little between runs.
    first = int(generator.integers(calls.resumable, int(0.9 * calls.made)))
    assert in_a_process(counted, in_folder(config, cut), 1, first) == (KILLED, None)
    assert checkpoints(cut)

    resume = {**config, "resume-from": str(cut)}
    rounds_left = ROUNDS - int(checkpoints(cut)[-1][-6:])
    # Roughly the calls of the rounds that are left, and at least those of the start.
    upto = max(calls.resumable // 2, int(0.6 * calls.made * rounds_left / ROUNDS))
    second = int(generator.integers(1, upto))
    assert in_a_process(counted, resume, 2, second) == (KILLED, None)

    assert in_a_process(to_its_end, resume, 3) == (0, digest)
    assert_same_artifacts(cut, whole)
    assert not left_behind(cut)


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_killed_while_a_checkpoint_is_written(
    call: str, config: dict[str, Any], tmp_path: Path
) -> None:
    """Its file is written in part or whole, but not renamed yet: the previous one counts."""
    config = {**config, "strategy": "fedavg", "num-server-rounds": 4}
    folder = tmp_path / "run"
    died = in_a_process(dying_when, call, "checkpoint-000003", in_folder(config, folder))
    assert died == (KILLED, None)
    assert checkpoints(folder) == ["checkpoint-000001", "checkpoint-000002"]
    (torn,) = left_behind(folder)
    assert torn.startswith(".checkpoint-000003")
    assert [row["round"] for row in rows(folder)] == [0, 1, 2, 3]
    code, digest = in_a_process(to_its_end, {**config, "resume-from": str(folder)}, 1)
    assert code == 0
    assert digest == run_in_process(in_folder(config, tmp_path / "whole")).digest
    assert_same_artifacts(folder, tmp_path / "whole")
    assert not left_behind(folder)


def test_files_that_may_not_grow_cost_no_checkpoint(
    config: dict[str, Any], whole: RunOutcome, tmp_path: Path
) -> None:
    """As on a full disk, where the system refuses: the run ends well, the last one stays."""
    folder = tmp_path / "run"
    model, checkpoint = (
        (whole.directory / f"{name}.safetensors").stat().st_size
        for name in ("final_models", "checkpoint-000006")
    )
    assert model < checkpoint
    limited = with_file_limit, (model + checkpoint) // 2, 3, in_folder(config, folder)
    assert in_a_process(*limited) == (0, whole.digest)
    assert checkpoints(folder) == ["checkpoint-000001", "checkpoint-000002"]
    assert not left_behind(folder)
    resume = {**config, "resume-from": str(folder)}
    assert in_a_process(to_its_end, resume, 1) == (0, whole.digest)
    assert_same_artifacts(folder, whole.directory)


def test_a_disk_without_any_room_ends_the_run_and_loses_nothing(
    config: dict[str, Any], whole: RunOutcome, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    assert in_a_process(with_file_limit, 1, 3, in_folder(config, folder)) == (1, None)
    assert checkpoints(folder) == ["checkpoint-000001", "checkpoint-000002"]
    resume = {**config, "resume-from": str(folder)}
    assert in_a_process(to_its_end, resume, 1) == (0, whole.digest)
    assert_same_artifacts(folder, whole.directory)
