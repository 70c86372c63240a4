# SPDX-License-Identifier: Apache-2.0
"""The TensorBoard log, read back."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fedfusion_flwr.config import ConfigError
from fedfusion_flwr.federation.round import FusionSnapshot, RoundReport
from fedfusion_flwr.fusion import FusionPosterior
from fedfusion_flwr.tracking import TensorBoardLog
from tests.runs import run_in_process

TINY = {
    "num-clients": 2,
    "num-server-rounds": 2,
    "partition": "iid",
    "train-examples": 200,
    "test-examples": 50,
    "strategy": "fedavg",
}


Log = dict[str, list[tuple[int, float]]]
"""Name -> (step, value) of every number."""
Reader = Callable[[Path], Log]


@pytest.fixture
def read() -> Reader:
    accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", reason="needs tensorboard"
    )

    def log(folder: Path) -> Log:
        events = accumulator.EventAccumulator(str(folder))
        events.Reload()
        names = events.Tags()["scalars"]
        return {name: [(e.step, e.value) for e in events.Scalars(name)] for name in names}

    return log


def report(server_round: int, accuracy: float) -> RoundReport:
    return RoundReport(server_round, metrics={"global-accuracy": accuracy})


def test_every_number_of_a_round_comes_back(tmp_path: Path, read: Reader) -> None:
    mixture = torch.tensor([0.25, 0.75], dtype=torch.float64)
    posterior = FusionPosterior(torch.ones(1, 2) / 2, mixture, torch.zeros(2, 4), 0.0)
    log = TensorBoardLog(tmp_path)
    log.on_round_end(report(0, 0.125))
    log.on_round_end(
        RoundReport(
            1,
            metrics={"global-accuracy": 0.5, "global-loss": float("nan")},
            seconds={"train": 2.0},
            fusion=FusionSnapshot([0], posterior, mixture, torch.ones(1)),
        )
    )
    assert read(tmp_path) == {
        "global-accuracy": [(0, 0.125), (1, 0.5)],
        "seconds/train": [(1, 2.0)],
        "mixture/0": [(1, 0.25)],
        "mixture/1": [(1, 0.75)],
    }


def test_a_resumed_run_replaces_the_rounds_that_it_repeats(tmp_path: Path, read: Reader) -> None:
    before = TensorBoardLog(tmp_path)
    for server_round in range(4):
        before.on_round_end(report(server_round, 0.0))
    again = TensorBoardLog(tmp_path)
    again.rewind(1)
    for server_round in (2, 3):
        again.on_round_end(report(server_round, 1.0))
    assert read(tmp_path)["global-accuracy"] == [(0, 0.0), (1, 0.0), (2, 1.0), (3, 1.0)]


def test_key_of_a_run(tmp_path: Path, read: Reader) -> None:
    for name, wanted in (("with", True), ("without", False)):
        config = {**TINY, "tensorboard": wanted, "output-dir": str(tmp_path / name)}
        run_in_process(config)
    assert not (tmp_path / "without" / "tensorboard").exists()
    logged = read(tmp_path / "with" / "tensorboard")
    assert [step for step, _ in logged["global-accuracy"]] == [0, 1, 2]
    assert {"train-loss", "client-steps", "bytes-up", "seconds/train"} <= set(logged)


def test_one_sentence_if_it_is_not_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ConfigError, match=r"pip install 'fedfusion-flwr\[tensorboard\]'"):
        TensorBoardLog(tmp_path)
