# SPDX-License-Identifier: Apache-2.0
"""A run that is cut off and resumed ends like one that was not."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Context, RecordDict

from fedfusion_flwr.app.server import RunOutcome, run
from fedfusion_flwr.federation.conversation import RunStopped
from fedfusion_flwr.tracking import (
    CheckpointError,
    RunDirectory,
    RunInterrupted,
    checkpoint,
    records,
)
from tests.runs import CONFIG, ROUNDS, DyingGrid, Killed, go_dying, rows, write_pictures


@pytest.fixture(autouse=True, scope="module")
def _pictures(tmp_path_factory: pytest.TempPathFactory) -> None:
    """A small data set, because every test here makes several runs."""
    path = write_pictures(tmp_path_factory.mktemp("data") / "pictures.npz")
    CONFIG["data-root"] = str(path)


def go(folder: Path, *, dies_in: int | None = None, seed: int = 0, **config: Any) -> RunOutcome:
    return go_dying(folder, dies_in=dies_in, seed=seed, **CONFIG | config)


def test_the_clipping_bound_goes_on(tmp_path: Path) -> None:
    config = {"strategy": "fedavg", "defence": "robust"}
    whole = go(tmp_path / "whole", **config)
    with pytest.raises(Killed):
        go(tmp_path / "cut", dies_in=5, **config)
    resumed = go(tmp_path / "cut", seed=1, **config, **{"resume-from": str(tmp_path / "cut")})
    assert resumed.digest == whole.digest
    bounds = [[r.get("clip-bound") for r in rows(tmp_path / f)] for f in ("whole", "cut")]
    assert bounds[0] == bounds[1]
    assert len(set(bounds[0])) == ROUNDS + 1


def test_rounds_after_the_checkpoint_are_forgotten(tmp_path: Path) -> None:
    """Checkpoints every second round: the third is run again; a torn line is dropped."""
    config = {"strategy": "fedavg", "checkpoint-every": 2}
    whole = go(tmp_path / "whole", **config)
    cut = tmp_path / "cut"
    with pytest.raises(Killed):
        go(cut, dies_in=4, **config)
    assert [row["round"] for row in rows(cut)] == [0, 1, 2, 3]
    with (cut / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"round": 4, "glo')
    assert go(cut, **config, **{"resume-from": str(cut)}).digest == whole.digest
    assert rows(cut) == rows(tmp_path / "whole")


def test_a_checkpoint_has_all_inferences_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the archive is not rewritten in every round."""
    monkeypatch.setattr(records, "ARCHIVE_GROWTH", 100)
    archived = []

    def look(directory: RunDirectory, written: checkpoint.Checkpoint) -> None:
        with np.load(directory.path / "fusion.npz") as data:
            archived.append((written.server_round, data["rounds"].tolist()))

    monkeypatch.setattr(checkpoint, "write_checkpoint", look)
    go(tmp_path, **{"checkpoint-every": 2, "num-server-rounds": 5})
    assert archived == [(2, [1, 2]), (4, [1, 2, 3, 4]), (5, [1, 2, 3, 4, 5])]


def test_a_run_without_checkpoints_ends_with_all_inferences(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(records, "ARCHIVE_GROWTH", 100)
    go(tmp_path, **{"checkpoint-every": 0, "num-server-rounds": 3})
    with np.load(tmp_path / "fusion.npz") as data:
        assert data["rounds"].tolist() == [1, 2, 3]


def test_a_finished_run_can_be_made_longer(tmp_path: Path) -> None:
    whole = go(tmp_path / "whole", strategy="fedavgm")
    go(tmp_path / "short", strategy="fedavgm", **{"num-server-rounds": 4})
    longer = go(tmp_path / "short", strategy="fedavgm", **{"resume-from": str(tmp_path / "short")})
    assert longer.digest == whole.digest


def test_another_config_is_refused_and_nothing_is_touched(tmp_path: Path) -> None:
    go(tmp_path / "run", strategy="fedavg", **{"num-server-rounds": 2})
    before = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    resume = {"resume-from": str(tmp_path / "run"), "learning-rate": 0.5}
    with pytest.raises(CheckpointError, match=r"^learning-rate = 0.5, but the run in .* has 0.02"):
        go(tmp_path / "run", strategy="fedavg", **resume)
    assert {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()} == before


def test_no_checkpoints_if_none_are_wanted(tmp_path: Path) -> None:
    go(tmp_path / "run", strategy="fedavg", **{"num-server-rounds": 2, "checkpoint-every": 0})
    assert not list((tmp_path / "run").glob("checkpoint-*"))
    with pytest.raises(CheckpointError, match="no usable checkpoint"):
        go(tmp_path, strategy="fedavg", **{"resume-from": str(tmp_path / "run")})


def test_a_signal_ends_the_run_after_its_round(tmp_path: Path) -> None:
    class SignallingGrid(DyingGrid):
        asked: int | None = None

        def send_and_receive(self, messages: Any, *, timeout: float | None = None) -> Any:
            if self.asked is not None:
                os.kill(os.getpid(), self.asked)
                self.asked = None
            return super().send_and_receive(messages, timeout=timeout)

    handlers = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    config = CONFIG | {"strategy": "fedavg", "checkpoint-every": 0}
    whole = go(tmp_path / "whole", **config)
    for number in (signal.SIGTERM, signal.SIGINT):
        folder = tmp_path / signal.Signals(number).name
        values = config | {"output-dir": str(folder)}
        context = Context(1, 0, {}, RecordDict(), values)
        grid = SignallingGrid(values)
        grid.asked = number
        sentence = f"ended by {folder.name} after round 1; .*{folder}"
        with pytest.raises(RunInterrupted, match=sentence):
            run(grid, context)
        assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == handlers
        assert (folder / "final_model.safetensors").exists()
        assert go(folder, **config, **{"resume-from": str(folder)}).digest == whole.digest


def test_a_run_that_no_longer_improves_ends_early(tmp_path: Path) -> None:
    config = {"strategy": "fedavg", "learning-rate": 1e-12, "best-metric": "personalized-loss"}
    outcome = go(tmp_path / "run", **config, **{"patience": 2, "evaluate-every": 1})
    metrics = rows(tmp_path / "run")
    losses = [row["personalized-loss"] for row in metrics[1:]]
    best = 1 + losses.index(min(losses))
    assert metrics[-1]["round"] == min(best + 2, ROUNDS)
    assert outcome.digest


def test_failed_rounds_leave_the_last_good_checkpoint(tmp_path: Path) -> None:
    class BreakingGrid(DyingGrid):
        def send_and_receive(self, messages: Any, *, timeout: float | None = None) -> Any:
            messages = list(messages)
            rounds = [m.content.config_records["config"]["server-round"] for m in messages]
            return [] if rounds[0] > 2 else super().send_and_receive(messages, timeout=timeout)

    values = CONFIG | {"strategy": "fedavg", "output-dir": str(tmp_path / "run")}
    with pytest.raises(RunStopped):
        run(BreakingGrid(values), Context(1, 0, {}, RecordDict(), values))
    names = sorted(path.name for path in (tmp_path / "run").glob("checkpoint-*"))
    assert names == ["checkpoint-000003.safetensors", "checkpoint-000004.safetensors"]
    whole = go(tmp_path / "whole", strategy="fedavg", **{"num-server-rounds": 2})
    assert whole.digest  # the first two rounds were good, and the two failed ones kept the model
