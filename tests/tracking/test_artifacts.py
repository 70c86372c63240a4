# SPDX-License-Identifier: Apache-2.0
"""What a run leaves on disk."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open

from fedfusion_flwr.config import RunConfig
from fedfusion_flwr.errors import FedFusionError
from fedfusion_flwr.federation.round import ClientRow, FusionSnapshot, RoundReport
from fedfusion_flwr.fusion import FusionPosterior
from fedfusion_flwr.tracking import (
    BestModel,
    FusionArchive,
    OutputError,
    RunDirectory,
    RunLog,
    state_digest,
)
from tests.support import assert_identical, tiny_model


def lines(directory: RunDirectory, name: str) -> list[dict[str, Any]]:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    text = (directory.path / name).read_text()
    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


def files(directory: RunDirectory) -> list[str]:
    return sorted(path.name for path in directory.path.iterdir())


def archived(directory: RunDirectory) -> dict[str, np.ndarray]:
    with np.load(directory.path / "fusion.npz", allow_pickle=False) as data:
        return dict(data)


def run_through(archive: FusionArchive, first: int, last: int) -> None:
    for server_round in range(first, last + 1):
        archive.on_round_end(RoundReport(server_round, fusion=snapshot([0])))


def snapshot(clients: list[int], first: float = 0.5) -> FusionSnapshot:
    k = len(clients)
    posterior = FusionPosterior(
        assignments=torch.eye(2, dtype=torch.float64)[[c % 2 for c in clients]],
        mixture=torch.tensor([0.25, 0.75], dtype=torch.float64),
        components=torch.full((2, 3), first, dtype=torch.float64),
        elbo=-1.0,
    )
    mixture = torch.tensor([first, 1 - first], dtype=torch.float64)
    return FusionSnapshot(clients, posterior, mixture, torch.full((k,), 1 / k).double())


def test_rows_of_a_round(directory: RunDirectory) -> None:
    log = RunLog(directory)
    log.on_round_end(RoundReport(0, metrics={"global-accuracy": 0.1, "global-loss": 2.3}))
    report = RoundReport(
        1,
        num_sampled=2,
        clients=[
            ClientRow(0, 77, 0, 9, weight=1.0, assignment=[0.0, 1.0], metrics={"train-loss": 0.5}),
            ClientRow(1, 78, dropped="nonfinite", detail="'x' is not finite"),
        ],
        metrics={"global-accuracy": 0.2, "global-loss": math.nan},
        seconds={"train": 1.5},
        fusion=snapshot([0, 1]),
    )
    log.on_round_end(report)
    first, second = lines(directory, "metrics.jsonl")
    assert first["round"] == 0
    assert first["global-accuracy"] == 0.1
    assert second == {
        "round": 1,
        "global-accuracy": 0.2,
        "global-loss": None,
        "clients-sampled": 2,
        "mixture": [0.5, 0.5],
        "seconds": {"train": 1.5},
    }
    good, bad = lines(directory, "clients.jsonl")
    assert good == {
        "round": 1,
        "client": 0,
        "node": 77,
        "partition": 0,
        "num-examples": 9,
        "weight": 1.0,
        "assignment": [0.0, 1.0],
        "train-loss": 0.5,
    }
    assert (bad["client"], bad["dropped"], bad["weight"]) == (1, "nonfinite", 0.0)


def test_numbers_that_are_not_finite_become_null(directory: RunDirectory) -> None:
    row = {"a": math.nan, "b": {"c": [math.inf, 1.0, [-math.inf]]}, "d": None, "e": "NaN", "f": 2}
    directory.append_json("rows.jsonl", row, {})
    directory.append_json("rows.jsonl", {"last": True})
    assert lines(directory, "rows.jsonl") == [
        {"a": None, "b": {"c": [None, 1.0, [None]]}, "d": None, "e": "NaN", "f": 2},
        {},
        {"last": True},
    ]


def test_json_keeps_the_order_of_keys(directory: RunDirectory) -> None:
    directory.write_json("config.json", RunConfig().to_run_config())
    read = json.loads((directory.path / "config.json").read_text())
    assert list(read) == list(RunConfig().to_run_config())
    assert RunConfig.from_run_config(read) == RunConfig()


def test_interrupted_writing_leaves_the_old_file(directory: RunDirectory) -> None:
    directory.write_json("x.json", 1)

    def interrupted() -> Iterator[bytes]:
        yield b"half a fi"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), directory.writing("x.json") as file:
        file.writelines(interrupted())
    assert json.loads((directory.path / "x.json").read_text()) == 1
    assert files(directory) == ["config.json", "x.json"]


def test_file_appears_only_when_whole(directory: RunDirectory) -> None:
    with directory.writing("y.bin") as file:
        file.write(b"first")
        file.flush()
        assert not (directory.path / "y.bin").exists()
    assert (directory.path / "y.bin").read_bytes() == b"first"


def test_directory_of_another_run_is_refused(directory: RunDirectory) -> None:
    RunDirectory(directory.path)  # nothing was logged yet
    directory.append_json("metrics.jsonl", {"round": 0})
    assert issubclass(OutputError, FedFusionError)
    with pytest.raises(
        OutputError, match=f"'{directory.path}' already holds a run; choose another"
    ):
        RunDirectory(directory.path)


def test_path_that_cannot_be_a_directory(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(OutputError, match="cannot be written"):
            RunDirectory(path)


def test_output_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    runs = tmp_path / "home" / "fedfusion-runs"

    def path(output_dir: str) -> Path:
        return RunDirectory.for_config(RunConfig(output_dir=output_dir)).path

    assert path("mine/first") == runs / "mine/first"
    assert path("~/elsewhere") == tmp_path / "home" / "elsewhere"
    assert path(str(tmp_path / "absolute")) == tmp_path / "absolute"
    unnamed, another = path(""), path("")
    assert unnamed != another
    assert unnamed.parent == runs
    assert unnamed.name.endswith("-fedfusion-mnist-5k")
    assert unnamed.is_dir()
    own = RunDirectory.for_config(RunConfig(dataset="my.data:load")).path
    assert own.name.endswith("-fedfusion-my.data-load")


def test_state_file(directory: RunDirectory) -> None:
    state = tiny_model().state_dict()
    state["transposed"] = torch.arange(6.0).reshape(2, 3).T
    state["shared"] = state["transposed"]
    directory.write_state("model.safetensors", state, round=3, best_accuracy=0.5)
    with safe_open(directory.path / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"round": "3", "best-accuracy": "0.5"}
        assert_identical({key: file.get_tensor(key) for key in state}, state)


def test_archive_is_padded_for_late_clients(directory: RunDirectory) -> None:
    archive = FusionArchive(directory)
    archive.on_round_end(RoundReport(0))
    assert "fusion.npz" not in files(directory)
    archive.on_round_end(RoundReport(1, fusion=snapshot([0, 2])))
    archive.on_round_end(RoundReport(2))  # a round without inference
    archive.on_round_end(RoundReport(3, fusion=snapshot([0, 1, 2, 5], first=0.25)))
    data, nan = archived(directory), np.nan
    assert data["rounds"].tolist() == [1, 3]
    assert data["clients"].tolist() == [0, 1, 2, 5]
    assignments = [
        [[1, 0], [nan, nan], [1, 0], [nan, nan]],
        [[1, 0], [0, 1], [1, 0], [0, 1]],
    ]
    np.testing.assert_array_equal(data["assignments"], assignments)
    np.testing.assert_array_equal(data["weights"], [[0.5, nan, 0.5, nan], [0.25] * 4])
    assert data["mixture"].tolist() == [[0.5, 0.5], [0.25, 0.75]]
    assert data["inferred_mixture"].tolist() == [[0.25, 0.75]] * 2
    assert data["components"].shape == (2, 2, 3)


def test_archive_keeps_the_newest_statistics_and_what_was_planted(directory: RunDirectory) -> None:
    archive = FusionArchive(directory)
    for server_round, value in ((1, 1.0), (2, 2.0)):
        fusion = dataclasses.replace(snapshot([0, 2]), statistics=torch.full((2, 3), value))
        archive.on_round_end(RoundReport(server_round, fusion=fusion, planted={2: 4}))
    archive.on_round_end(RoundReport(3, fusion=dataclasses.replace(fusion, clients=[0, 7])))
    data = archived(directory)
    assert data["clients"].tolist() == [0, 2, 7]
    assert data["planted"].tolist() == [-1, -1, -1]
    np.testing.assert_array_equal(data["statistics"], [[2.0] * 3, [np.nan] * 3, [2.0] * 3])
    # Those of earlier rounds are not kept.
    assert all("statistics" not in row for row in archive.rows)


def test_archive_holds_planted_mixtures_in_the_order_of_its_clients(
    directory: RunDirectory,
) -> None:
    archive = FusionArchive(directory)
    mixtures = {5: np.array([0.1, 0.7, 0.2]), 0: np.array([1.0, 0.0, 0.0])}
    planted = RoundReport(1, fusion=snapshot([0, 2, 5]), planted={5: 1, 0: 0})
    planted.planted_mixtures = mixtures
    archive.on_round_end(planted)
    expected = [[1, 0, 0], [np.nan] * 3, [0.1, 0.7, 0.2]]
    np.testing.assert_array_equal(archived(directory)["planted_mixtures"], expected)
    # A run that is resumed has them before its first round.
    resumed = FusionArchive(directory)
    resumed.rewind(1)
    resumed.write()
    np.testing.assert_array_equal(archived(directory)["planted_mixtures"], expected)
    assert archived(directory)["planted"].tolist() == [0, -1, 1]


def test_archive_has_no_planted_mixtures_where_nothing_is_planted(directory: RunDirectory) -> None:
    run_through(FusionArchive(directory), 1, 2)
    assert "planted_mixtures" not in archived(directory)
    FusionArchive(directory).rewind(1)


def test_a_long_run_rewrites_the_archive_rarely(directory: RunDirectory) -> None:
    archive = FusionArchive(directory)
    written: list[int] = []
    for server_round in range(1, 161):
        run_through(archive, server_round, server_round)
        stored = len(archived(directory)["rounds"])
        if stored != (written or [0])[-1]:
            written.append(stored)
        assert 16 * (server_round - stored) <= stored
    # Every round up to the 16th, then after 2 more up to 32, after 3 up to 48, and so on.
    assert written[:18] == [*range(1, 17), 18, 20]
    assert len(written) < 60
    archive.write()
    assert archived(directory)["rounds"].tolist() == list(range(1, 161))


def test_an_archive_that_is_read_back_goes_on(directory: RunDirectory) -> None:
    first = FusionArchive(directory)
    run_through(first, 1, 40)
    first.write()
    second = FusionArchive(directory)
    second.rewind(30)
    run_through(second, 31, 31)
    assert archived(directory)["rounds"].tolist() == list(range(1, 32))


def test_best_model_is_the_first_of_the_highest(directory: RunDirectory) -> None:
    best = BestModel(directory)
    best.on_round_end(RoundReport(1))  # without an accuracy
    assert files(directory) == ["config.json"]
    for server_round, accuracy in enumerate([0.99, 0.3, 0.5, math.nan, 0.5, 0.4, -math.inf]):
        model = {"x": torch.tensor([float(server_round)])}
        best.on_round_end(
            RoundReport(server_round, metrics={"global-accuracy": accuracy}, model=model)
        )
    assert (best.state.server_round, best.state.value) == (2, 0.5)
    with safe_open(directory.path / "best_model.safetensors", framework="pt") as file:
        assert file.get_tensor("x").item() == 2.0
        assert file.metadata() == {"round": "2", "global-accuracy": "0.5"}


def test_equal_states_have_equal_digests() -> None:
    state = tiny_model().state_dict()
    assert len(state_digest(state)) == 64
    assert state_digest(dict(reversed(state.items()))) == state_digest(state)
    matrix = torch.arange(6.0).reshape(2, 3)
    assert state_digest({"x": matrix.T.contiguous()}) == state_digest({"x": matrix.T})


def test_digest_sees_every_difference() -> None:
    zeros = torch.zeros(4)
    tensors = [
        *(zeros, zeros.reshape(2, 2), zeros.to(torch.int32), zeros[:3]),
        *(torch.tensor([0.0, 0.0, 0.0, -0.0]), torch.tensor([0.0, 0.0, 0.0, 1e-45])),
        *(torch.empty(0), torch.empty(0, 1)),
        *(torch.tensor(0.0), torch.tensor(False), torch.tensor(0)),
    ]
    states = [{}, {"y": zeros}, {"x": zeros, "y": zeros}, *({"x": tensor} for tensor in tensors)]
    assert len({state_digest(state) for state in states}) == len(states)
