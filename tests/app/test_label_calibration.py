# SPDX-License-Identifier: Apache-2.0
"""Label calibration from the run config to the client's loss, and the prior in its evaluation."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Message
from torch import Tensor
from torch.nn import functional as F

from fedfusion_flwr import RunConfig, calibrated_cross_entropy, label_log_prior, protocol
from fedfusion_flwr.app.server import label_calibration
from fedfusion_flwr.app.training import train
from fedfusion_flwr.computation import place_model
from fedfusion_flwr.data import LocalData, data_for, local_data
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
        batch_size=32,
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


def test_published_strategies_train_the_plain_loss_unless_told() -> None:
    for name in registry():
        assert label_calibration(RunConfig(strategy=name)) == 0, name
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
