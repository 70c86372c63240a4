# SPDX-License-Identifier: Apache-2.0
"""A fixed number of gradient steps: in a round's training, and before a personal evaluation."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Message

from fedfusion_flwr import RunConfig, protocol
from fedfusion_flwr.app.local_work import LocalWork
from fedfusion_flwr.data import data_for, local_data
from fedfusion_flwr.experiments.centralized import federated_steps
from fedfusion_flwr.models import model_for
from tests.runs import ask_client, rows, run_in_process, write_pictures

CLIENTS = 4


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    path = write_pictures(tmp_path_factory.mktemp("data") / "pictures.npz")
    return {
        "dataset": "npz",
        "data-root": str(path),
        "num-clients": CLIENTS,
        "partition": "shards",
        "strategy": "fedavg",
        "num-server-rounds": 2,
        "evaluate-every": 1,
        "checkpoint-every": 0,
        "batch-size": 8,
    }


def ask(config: dict[str, Any], kind: str = "train", **sent: Any) -> Message:
    parsed = RunConfig.from_run_config(config)
    arrays = protocol.record_from_state(model_for(parsed, data_for(parsed)).state_dict())
    node = {"partition-id": 1, "num-partitions": CLIENTS}
    reply = ask_client(config, node, arrays, kind, {"server-round": 1, **sent})
    assert not reply.has_error(), reply.error
    return reply


def steps_of(reply: Message) -> object:
    return reply.content.metric_records["metrics"]["gradient-steps"]


def test_steps_replace_epochs_unless_the_strategy_asks_for_others(base: dict[str, Any]) -> None:
    in_epoch = -(-len(local_data(RunConfig.from_run_config(base), 1).x) // 8)
    assert steps_of(ask(base)) == in_epoch
    fixed = {**base, "local-steps": 3, "local-epochs": 2}
    assert steps_of(ask(fixed)) == 3
    assert steps_of(ask({**base, "local-steps": 5 * in_epoch})) == 5 * in_epoch
    assert steps_of(ask(fixed, **{"max-steps": 2})) == 2
    assert steps_of(ask(fixed, **{"local-epochs": 1})) == in_epoch


def test_every_client_takes_the_steps_in_every_round(base: dict[str, Any], tmp_path: Path) -> None:
    config = {**base, "output-dir": str(tmp_path), "local-steps": 3, "fraction-train": 0.5}
    run_in_process(config)
    assert [row["client-steps"] for row in rows(tmp_path)[1:]] == [6, 6]
    assert federated_steps(RunConfig.from_run_config(config)) == 12


@pytest.mark.parametrize("tau", [0.0, 0.5])
def test_a_client_evaluates_what_so_many_steps_made_of_its_model(
    base: dict[str, Any], tau: float
) -> None:
    """By hand: trained with the message's loss and the config's rate, on the training part."""
    config = {**base, "finetune-steps": 4, "label-calibration": tau, "learning-rate": 0.05}
    metrics = ask(config, "evaluate").content.metric_records["metrics"]
    plain = ask({**config, "finetune-steps": 0}, "evaluate").content.metric_records["metrics"]
    assert metrics["personalized-loss"] < plain["personalized-loss"]  # type: ignore[operator]

    parsed = RunConfig.from_run_config(config)
    state = model_for(parsed, data_for(parsed)).state_dict()
    settings = {"server-round": 1, "label-calibration": tau}
    work = LocalWork.prepare(parsed, 1, settings, copy.deepcopy(state))  # type: ignore[arg-type]
    assert work.fit("finetune", steps=4).steps == 4
    with torch.no_grad():
        logits = work.model.eval()(work.data.x_validation)
    loss = torch.nn.functional.cross_entropy(logits, work.data.y_validation)
    assert metrics["personalized-loss"] == pytest.approx(float(loss))
    right = logits.argmax(1) == work.data.y_validation
    assert metrics["personalized-accuracy"] == pytest.approx(float(right.double().mean()))


@pytest.mark.parametrize("strategy", ["fedavg", "fedbn", "ifca", "fedfusion"])
def test_finetuning_serves_clients_better_and_leaves_the_global_model_alone(
    base: dict[str, Any], tmp_path: Path, strategy: str
) -> None:
    keys = {"strategy": strategy, "num-clusters": 2, "vae-steps": 5, "num-components": 2}
    folders = {steps: tmp_path / str(steps) for steps in (0, 20)}
    digests = {
        run_in_process({**base, **keys, "output-dir": str(folder), "finetune-steps": steps}).digest
        for steps, folder in folders.items()
    }
    assert len(digests) == 1
    losses = [rows(folder)[-1]["personalized-loss"] for folder in folders.values()]
    assert losses[1] < losses[0]
