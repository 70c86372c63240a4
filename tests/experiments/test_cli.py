# SPDX-License-Identifier: Apache-2.0
"""The console script, down to real runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from fedfusion_flwr.app.training import shuffled_batches
from fedfusion_flwr.cli import main
from fedfusion_flwr.config import RunConfig
from fedfusion_flwr.experiments.centralized import federated_steps, steps_of, train_centralized
from fedfusion_flwr.experiments.results import runs_table
from fedfusion_flwr.experiments.rows import read_rows
from fedfusion_flwr.randomness import torch_generator
from fedfusion_flwr.tracking import state_digest

SUITE = """
[common]
num-clients = 4
num-server-rounds = 2
train-examples = 400
test-examples = 100

[partitions.skewed]
partition = "dirichlet"
dirichlet-alpha = 0.5

[[groups]]
name = "main"
strategies = ["fedavg", "bad"]
datasets = ["mnist-5k"]
models = ["lenet"]
partitions = ["skewed"]
seeds = [0]

[strategies.bad]
strategy = "fedavg"
train-examples = 5000
"""
CONFIG: dict[str, Any] = {
    "dataset": "mnist-5k",
    "model": "lenet",
    "num-clients": 4,
    "num-server-rounds": 2,
    "partition": "dirichlet",
    "dirichlet-alpha": 0.5,
    "train-examples": 400,
    "test-examples": 100,
}


def test_compare_runs_cells_and_makes_tables(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.toml").write_text(SUITE)
    folder = tmp_path / "results"
    command = ["compare", str(tmp_path / "mine.toml"), "--output", str(folder)]
    assert main([*command, "--engine", "in-process", "--workers", "2"]) == 1
    (row,) = read_rows(folder / "cells.jsonl")
    assert row["metrics"]["round"] == [0, 1, 2]
    assert "bias" not in row
    assert row["engine"] == "in-process"
    assert {"python", "torch", "flwr", "commit", "machine", "seconds"} <= set(row)
    run_directory = folder / "runs" / row["cell"]
    assert row["digest"] == state_digest(load_file(run_directory / "final_model.safetensors"))
    (failure,) = read_rows(folder / "failures.jsonl")
    assert failure["strategy"] == "bad"
    sentence = "`train-examples` is 5000, but data set 'mnist-5k' has 4000 of them"
    assert failure["error"].startswith(sentence)
    shown = capsys.readouterr()
    assert "1 cells failed" in shown.err
    assert sentence in shown.out
    accuracy = json.loads((folder / "tables" / "accuracy.json").read_text())
    assert accuracy[0]["global-accuracy"] == row["metrics"]["global-accuracy"][-1]

    # The reference begins as the run did, and takes as many steps as its clients together.
    config = RunConfig.from_run_config(row["config"])
    runs, _ = runs_table([row])
    assert federated_steps(config) == runs["client-steps"][0]
    reference = train_centralized(dict(row["config"]), str(folder), "models/x.safetensors", 0)
    assert reference["steps"] == federated_steps(config)
    assert reference["accuracy"][0] == row["metrics"]["global-accuracy"][0]
    assert reference["loss"][0] == pytest.approx(row["metrics"]["global-loss"][0])


def test_centralized_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["centralized", "--dataset", "mnist-5k", "--model", "lenet", "--steps", "20"]
    command += ["--run-config", "train-examples=400 test-examples=100"]
    command += ["--output", str(tmp_path)]
    for batch_seed in ("0", "1", "0"):
        assert main([*command, "--batch-seed", batch_seed]) == 0
    assert "after 20 steps" in capsys.readouterr().out
    # The third replaced the first, and is the same.
    one, zero = read_rows(tmp_path / "centralized.jsonl")
    assert (one["batch_seed"], zero["batch_seed"]) == (1, 0)
    assert zero["accuracy"][0] == one["accuracy"][0]
    assert zero["digest"] != one["digest"]
    for row in (zero, one):
        # 360 of 400 examples train, 12 batches an epoch.
        assert row["checkpoints"] == [0, 12, 20]
        assert (len(row["accuracy"]), row["steps"]) == (3, 20)
        saved = load_file(tmp_path / row["model_file"])
        assert state_digest(saved) == row["digest"]


def test_same_batches_same_model(tmp_path: Path) -> None:
    rows = [train_centralized(CONFIG, str(tmp_path), "m", 3, steps=4) for _ in range(2)]
    assert rows[0]["digest"] == rows[1]["digest"]


@pytest.mark.parametrize("examples", [1, 2, 31, 32, 33, 34, 64, 65, 96, 97])
def test_steps_of_an_epoch_are_its_batches(examples: int) -> None:
    batches = shuffled_batches(examples, 32, torch_generator(0, "x"))
    assert steps_of(examples, 32) == len(list(batches))


def test_steps_of_part_of_the_clients_in_several_epochs() -> None:
    # 4,000 digits, 10 clients of 400, of which 360 train: 12 steps, and 4 clients a round.
    config = RunConfig(
        partition="iid", num_clients=10, fraction_train=0.4, local_epochs=3, num_server_rounds=5
    )
    assert federated_steps(config) == 5 * 3 * 4 * 12


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["compare", "smal"], "there is no suite 'smal'"),
        (["compare", "quick", "--group", "mian"], "no group 'mian'"),
        (["compare", "quick", "--data-root", "mnist=."], "no data set 'mnist'"),
        (["centralized", "--dataset", "x", "--model", "lenet"], "dataset = 'x' is not allowed"),
        (
            ["centralized", "--dataset", "mnist-5k", "--model", "lenet", "--run-config", "seed"],
            "'seed' is no run-config override",
        ),
    ],
)
def test_what_is_wrong_is_said_in_one_sentence(
    arguments: list[str],
    sentence: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    shown = capsys.readouterr().err
    assert sentence in shown
    assert shown.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_data_root_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["compare", "quick", "--data-root", "mnist-5k=/not/there"])
    assert "there is no '/not/there'" in capsys.readouterr().err


def test_dry_run_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["compare", "small", "--dry-run", "--engine", "in-process", "--workers", "2"]) == 0
    assert "cells to do: about" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []
