# SPDX-License-Identifier: Apache-2.0
"""What a client does with a model: which loss it trains, how long, and what it evaluates."""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Message
from torch import Tensor
from torch.nn import functional as F

from fedfusion_flwr import RunConfig, calibrated_cross_entropy, label_log_prior, protocol
from fedfusion_flwr.app.local_work import LocalWork
from fedfusion_flwr.app.server import label_calibration
from fedfusion_flwr.app.training import shuffled_batches, train
from fedfusion_flwr.computation import place_model
from fedfusion_flwr.data import LocalData, data_for, local_data
from fedfusion_flwr.experiments.centralized import federated_steps
from fedfusion_flwr.models import model_for
from fedfusion_flwr.randomness import torch_generator
from fedfusion_flwr.strategies import FedAvg, registry
from tests.runs import ask_client, rows, run_in_process, state_of, write_pictures
from tests.support import assert_identical

CLIENTS = 4


class Calibrated(FedAvg):
    """A strategy of somebody's own, with a tau of its own."""

    name = ""
    own_label_calibration = 0.75


OWN = f"{__name__}:Calibrated"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    path = write_pictures(tmp_path_factory.mktemp("data") / "pictures.npz")
    return {
        "dataset": "npz",
        "data-root": str(path),
        "num-clients": CLIENTS,
        "partition": "dirichlet",
        "dirichlet-alpha": 0.5,
        "strategy": "fedavg",
        "num-server-rounds": 1,
        "checkpoint-every": 0,
        "learning-rate": 0.1,
        "batch-size": 8,
    }


def ask(config: dict[str, Any], kind: str = "train", **sent: Any) -> Message:
    parsed = RunConfig.from_run_config(config)
    arrays = protocol.record_from_state(model_for(parsed, data_for(parsed)).state_dict())
    node = {"partition-id": 1, "num-partitions": CLIENTS}
    reply = ask_client(config, node, arrays, kind, {"server-round": 1, **sent})
    assert not reply.has_error(), reply.error
    return reply


def counts_of(data: LocalData) -> Tensor:
    return torch.tensor([float((data.y == c).sum()) for c in range(4)])


@pytest.mark.parametrize("tau", [0.0, 0.5])
def test_a_client_trains_the_loss_that_its_message_names(base: dict[str, Any], tau: float) -> None:
    """As does a training by hand; the run config counts where the server says nothing."""
    replies = (
        ask(base, **{"label-calibration": tau}),
        ask({**base, "label-calibration": tau}),
        ask({**base, "label-calibration": 0.9}, **{"label-calibration": tau}),
    )
    # From here on, torch has as few threads as a client: rounding depends on it.
    config = RunConfig.from_run_config(base)
    data = local_data(config, 1)
    assert len(counts_of(data).unique()) > 1
    loss = functools.partial(calibrated_cross_entropy, label_counts=counts_of(data), tau=tau)
    model = place_model(model_for(config, data_for(config)), torch.device("cpu"))
    train(
        *(model, data.x, data.y),
        epochs=1,
        batch_size=8,
        learning_rate=0.1,
        momentum=0.9,
        weight_decay=1e-4,
        generator=torch_generator(0, "training", 1, 1),
        criterion=loss if tau else F.cross_entropy,
    )
    for reply in replies:
        assert_identical(state_of(reply), model.state_dict())


def test_the_personal_accuracy_with_the_prior_is_that_of_the_training_labels(
    base: dict[str, Any],
) -> None:
    config = RunConfig.from_run_config(base)
    data, model = local_data(config, 1), model_for(config, data_for(config)).eval()
    with torch.no_grad():
        logits = model(data.x_validation)
    right = (logits + label_log_prior(counts_of(data))).argmax(1) == data.y_validation
    metrics = ask(base, "evaluate").content.metric_records["metrics"]
    assert metrics["personalized-prior-accuracy"] == pytest.approx(float(right.double().mean()))
    plain = (logits.argmax(1) == data.y_validation).double().mean()
    assert metrics["personalized-accuracy"] == pytest.approx(float(plain))
    # An untrained model guesses; the prior alone knows something.
    assert metrics["personalized-prior-accuracy"] > metrics["personalized-accuracy"]  # type: ignore[operator]


def test_rivals_train_the_plain_loss_as_published_unless_told() -> None:
    for name in registry():
        own = 0.5 if name == "fedfusion" else 0
        assert label_calibration(RunConfig(strategy=name)) == own, name
        assert label_calibration(RunConfig(strategy=name, label_calibration=0.3)) == 0.3
    assert label_calibration(RunConfig(strategy=OWN)) == 0.75
    assert label_calibration(RunConfig(strategy=OWN, label_calibration=0.0)) == 0


def test_a_whole_run(base: dict[str, Any], tmp_path: Path) -> None:
    """The server sends the clients the strategy's own tau; -1 of FedAvg is the plain loss."""

    def digest(name: str, **keys: Any) -> str:
        return run_in_process({**base, "output-dir": str(tmp_path / name), **keys}).digest

    plain = digest("plain")
    assert digest("zero", **{"label-calibration": 0.0}) == plain
    calibrated = digest("calibrated", **{"label-calibration": 0.75})
    assert calibrated != plain
    assert digest("own", strategy=OWN) == calibrated


@pytest.mark.parametrize("strategy", ["fedavg", "fedbn", "ifca"])
def test_every_run_reports_the_prior_beside_the_plain_number(
    base: dict[str, Any], tmp_path: Path, strategy: str
) -> None:
    run_in_process({**base, "output-dir": str(tmp_path), "strategy": strategy, "num-clusters": 2})
    last = rows(tmp_path)[-1]
    assert 0 <= last["personalized-accuracy"] <= 1
    assert 0 <= last["personalized-prior-accuracy"] <= 1


def steps_of(reply: Message) -> object:
    return reply.content.metric_records["metrics"]["gradient-steps"]


def test_steps_replace_epochs_unless_the_strategy_asks_for_others(base: dict[str, Any]) -> None:
    examples = len(local_data(RunConfig.from_run_config(base), 1).x)
    in_epoch = len(list(shuffled_batches(examples, 8, torch_generator(0, "any"))))
    assert steps_of(ask(base)) == in_epoch
    fixed = {**base, "local-steps": 3, "local-epochs": 2}
    assert steps_of(ask(fixed)) == 3
    assert steps_of(ask({**base, "local-steps": 5 * in_epoch})) == 5 * in_epoch
    assert steps_of(ask(fixed, **{"max-steps": 2})) == 2
    assert steps_of(ask(fixed, **{"local-epochs": 1})) == in_epoch


def test_every_client_takes_the_steps_in_every_round(base: dict[str, Any], tmp_path: Path) -> None:
    keys = {"local-steps": 3, "fraction-train": 0.5, "num-server-rounds": 2}
    config = {**base, **keys, "output-dir": str(tmp_path)}
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
    keys |= {"num-server-rounds": 2, "learning-rate": 0.02}
    folders = {steps: tmp_path / str(steps) for steps in (0, 20)}
    digests = {
        run_in_process({**base, **keys, "output-dir": str(folder), "finetune-steps": steps}).digest
        for steps, folder in folders.items()
    }
    assert len(digests) == 1
    losses = [rows(folder)[-1]["personalized-loss"] for folder in folders.values()]
    assert losses[1] < losses[0]


@pytest.mark.parametrize("steps", [0, 3])
def test_own_statistics_are_those_of_the_training_data_under_the_received_parameters(
    base: dict[str, Any], steps: int
) -> None:
    """By hand: one pass of PyTorch's own cumulative average; fine-tuning starts from there."""
    config = {**base, "evaluation-normalization": "own", "finetune-steps": steps}
    metrics = ask(config, "evaluate").content.metric_records["metrics"]
    parsed = RunConfig.from_run_config(config)
    state = model_for(parsed, data_for(parsed)).state_dict()
    work = LocalWork.prepare(parsed, 1, {"server-round": 1}, copy.deepcopy(state))  # type: ignore[arg-type]
    layers = [m for m in work.model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    for layer in layers:
        layer.momentum = None
        layer.reset_running_stats()
    with torch.no_grad():
        work.model.train()(work.data.x)
    for layer in layers:
        layer.momentum = 0.1
    if steps:
        work.fit("finetune", steps=steps)
    else:
        for name, value in work.model.named_parameters():
            assert torch.equal(value, state[name])
    with torch.no_grad():
        logits = work.model.eval()(work.data.x_validation)
    loss = float(torch.nn.functional.cross_entropy(logits, work.data.y_validation))
    assert metrics["personalized-loss"] == pytest.approx(loss, rel=1e-4)
    received = ask({**config, "evaluation-normalization": "received"}, "evaluate")
    assert received.content.metric_records["metrics"]["personalized-loss"] != pytest.approx(loss)


def test_own_statistics_change_nothing_without_batchnorm(base: dict[str, Any]) -> None:
    losses = [
        ask(
            {**base, "normalization": "group", "evaluation-normalization": which}, "evaluate"
        ).content.metric_records["metrics"]["personalized-loss"]
        for which in ("received", "own")
    ]
    assert losses[0] == losses[1]


@pytest.mark.parametrize("strategy", ["fedavg", "fedbn", "ifca", "fedfusion"])
def test_own_statistics_are_only_for_the_evaluation(
    base: dict[str, Any], tmp_path: Path, strategy: str
) -> None:
    keys = {"strategy": strategy, "num-clusters": 2, "vae-steps": 5, "num-components": 2}
    folders = {which: tmp_path / which for which in ("received", "own")}
    digests = {
        run_in_process(
            {**base, **keys, "output-dir": str(folder), "evaluation-normalization": which}
        ).digest
        for which, folder in folders.items()
    }
    assert len(digests) == 1
    losses = {rows(folder)[-1]["personalized-loss"] for folder in folders.values()}
    assert len(losses) == 2
