# SPDX-License-Identifier: Apache-2.0
"""What clients are served, scored on the test set by their own labels and views."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fedfusion_flwr import RunConfig, label_log_prior
from fedfusion_flwr.app.local import IN_PROCESS, run_locally
from fedfusion_flwr.app.training import evaluate, measure_running_statistics
from fedfusion_flwr.data import data_for, local_data, partition_for
from fedfusion_flwr.experiments import served
from fedfusion_flwr.experiments.federated import run_cell
from fedfusion_flwr.experiments.served import (
    client_shares,
    measure_served,
    served_accuracy,
    views_of_test_set,
)
from fedfusion_flwr.experiments.suite import parse_suite
from fedfusion_flwr.experiments.work import Machine
from fedfusion_flwr.models import model_for
from tests.runs import write_pictures

CLIENTS = 4
LABELS = torch.tensor([0, 0, 1, 1, 1, 1])
LOGITS = torch.tensor([[1.0, 0], [0, 1], [0, 1], [0, 1], [0, 3], [1, 0]])
"""Right: one of two of class 0, three of four of class 1."""


def of_identity(shares: Any, *views: Tensor, counts: Any = None) -> served.Served:
    """Served by a model that passes its input on; no prior without counts."""
    shares = np.array(shares, dtype=float)
    priors = torch.zeros(len(shares), 2)
    if counts is not None:
        priors = torch.stack([label_log_prior(torch.tensor(c)) for c in counts])
    return served_accuracy(nn.Identity(), views, LABELS, shares, priors)


def test_a_table_by_hand() -> None:
    """Client 0 has three quarters of class 0, client 1 class 1 alone."""
    found = of_identity([[[3, 1]], [[0, 2]]], LOGITS, counts=[[9, 1], [1, 9]])
    assert found.plain.tolist() == pytest.approx([0.75 * 0.5 + 0.25 * 0.75, 0.75])
    # log(0.91 / 0.11) = 2.11 more for class 0 turns all but the lead of 3: of class 0 both are
    # right, of class 1 one of four. For client 1 it is the other way round: all of class 1.
    assert found.prior.tolist() == pytest.approx([0.75 * 1 + 0.25 * 0.25, 1.0])


def test_views_count_by_the_clients_share_of_them() -> None:
    """The second view shows everything the other way round: 1/2 and 1/4 are right in it."""
    shares = [[[1, 0], [0, 1]], [[0, 0], [2, 2]], [[0, 4], [0, 4]]]
    found = of_identity(shares, LOGITS, LOGITS.flip(1))
    expected = [(0.5 + 0.25) / 2, (0.5 + 0.25) / 2, (0.75 + 0.25) / 2]
    assert found.plain.tolist() == pytest.approx(expected)
    assert found.prior.tolist() == pytest.approx(expected)


def test_what_the_test_set_lacks_does_not_count() -> None:
    labels = torch.tensor([0, 0])
    shares = np.array([[[1.0, 7.0]], [[0.0, 3.0]]])
    found = served_accuracy(nn.Identity(), [LOGITS[:2]], labels, shares, torch.zeros(2, 2))
    assert found.plain[0] == 0.5
    assert np.isnan(found.plain[1])


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 5), st.floats(0.1, 100))
def test_a_client_like_the_test_set_is_served_its_accuracy(
    seed: int, classes: int, factor: float
) -> None:
    """Every other client something between the worst class and the best."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (30,), generator=generator)
    logits = torch.randn(30, classes, generator=generator)
    counts = torch.bincount(labels, minlength=classes).double().numpy()
    other = np.random.default_rng(seed).random(classes) + 1e-3
    shares = np.stack([factor * counts, other])[:, None]
    equal = torch.zeros(2, classes)
    found = served_accuracy(nn.Identity(), [logits], labels, shares, equal)
    _, accuracy = evaluate(nn.Identity(), logits, labels)
    assert found.plain[0] == pytest.approx(accuracy)
    np.testing.assert_allclose(found.plain, found.prior, rtol=1e-12)
    right = (logits.argmax(1) == labels).double()
    by_class = [float(right[labels == c].mean()) for c in labels.unique()]
    assert min(by_class) - 1e-12 <= found.plain[1] <= max(by_class) + 1e-12


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    path = write_pictures(tmp_path_factory.mktemp("data") / "pictures.npz", test=80)
    return {
        "dataset": "npz",
        "data-root": str(path),
        "num-clients": CLIENTS,
        "num-server-rounds": 3,
        "planted-components": 2,
        "strategy": "fedavg",
        "checkpoint-every": 0,
        "learning-rate": 0.1,
        "num-clusters": 2,
        "warmup-rounds": 1,
        "num-components": 2,
        "vae-steps": 5,
    }


def test_shares_are_the_partition(base: dict[str, Any]) -> None:
    config = RunConfig.from_run_config(base)
    shares, cut = client_shares(config), partition_for(config)
    assert shares.shape == (CLIENTS, 1, 4)
    for client in range(CLIENTS):
        labels = data_for(config).y_train[cut.indices[client]]
        assert shares[client, 0].tolist() == [int((labels == c).sum()) for c in range(4)]
    assert [len(x) for x in views_of_test_set(config)] == [80]


def test_turned_pictures_are_views(base: dict[str, Any]) -> None:
    """Every client has one component's; the second shows them upside down."""
    config = RunConfig.from_run_config({**base, "component-transform": "rotate"})
    shares, cut = client_shares(config), partition_for(config)
    assert cut.main_components is not None
    for client, main in enumerate(cut.main_components):
        assert shares[client].any(1).tolist() == [main == 0, main == 1]
    upright, turned = views_of_test_set(config)
    assert torch.equal(turned, upright.rot90(2, dims=(2, 3)))


@pytest.mark.parametrize("strategy", ["fedavg", "ifca", "fedbn", "fedfusion"])
@pytest.mark.parametrize("transform", ["none", "rotate"])
def test_a_run_is_scored_client_by_client(
    base: dict[str, Any], tmp_path: Path, strategy: str, transform: str
) -> None:
    """As by hand: load the client's model, keep its part of the test set, count."""
    keys = {"strategy": strategy, "component-transform": transform, "output-dir": str(tmp_path)}
    outcome = run_locally({**base, **keys})
    found = measure_served({**base, **keys}, outcome.strategy)
    config = RunConfig.from_run_config({**base, **keys})
    data, shares = data_for(config), client_shares(config)
    model, views = model_for(config, data), views_of_test_set(config)
    plain, prior = [], []
    for client in range(CLIENTS):
        candidates = [outcome.strategy.personal_model(client)]
        mine = local_data(config, client)
        if strategy == "ifca":
            candidates = list(outcome.strategy.models().values())

        def loss(state: Any, mine: Any = mine) -> float:
            model.load_state_dict(state)
            return evaluate(model, mine.x, mine.y)[0]

        model.load_state_dict(min(candidates, key=loss))
        counts = torch.tensor([int((mine.y == c).sum()) for c in range(4)])
        correct = np.zeros(2)
        for view, x in enumerate(views):
            with torch.no_grad():
                logits = model.eval()(x)
            for c in range(4):
                part = logits[data.y_test == c]
                for i, scores in enumerate((part, part + label_log_prior(counts))):
                    right = float((scores.argmax(1) == c).double().mean())
                    correct[i] += shares[client, view, c] * right
        plain.append(correct[0] / shares[client].sum())
        prior.append(correct[1] / shares[client].sum())
    assert found["served"]["mean"] == pytest.approx(np.mean(plain), abs=1e-5)
    assert found["served"]["worst"] == pytest.approx(min(plain), abs=1e-5)
    assert found["served-prior"]["mean"] == pytest.approx(np.mean(prior), abs=1e-5)
    assert found["served-prior"]["worst"] == pytest.approx(min(prior), abs=1e-5)
    assert found["served-epoch-prior"]["mean"] >= found["served-prior"]["mean"] - 0.1
    # Measuring changes nothing that is measured.
    assert measure_served({**base, **keys}, outcome.strategy) == found


def test_the_epoch_has_the_loss_of_the_run(base: dict[str, Any], tmp_path: Path) -> None:
    keys = {"partition": "dirichlet", "dirichlet-alpha": 0.3, "output-dir": str(tmp_path)}
    outcome = run_locally({**base, **keys})
    plain = measure_served({**base, **keys}, outcome.strategy)
    calibrated = measure_served({**base, **keys, "label-calibration": 1.0}, outcome.strategy)
    assert calibrated["served-prior"] == plain["served-prior"]
    assert calibrated["served-epoch-prior"] != plain["served-epoch-prior"]


def test_clients_are_scored_with_their_own_statistics(base: dict[str, Any], tmp_path: Path) -> None:
    """As by hand: load the model, measure on the client's training data, count."""
    keys = {**base, "component-transform": "rotate", "output-dir": str(tmp_path)}
    outcome = run_locally(keys)
    own = {**keys, "evaluation-normalization": "own"}
    config = RunConfig.from_run_config(own)
    data, shares, views = data_for(config), client_shares(config), views_of_test_set(config)
    model, accuracies = model_for(config, data), []
    for client in range(CLIENTS):
        model.load_state_dict(outcome.strategy.served)
        measure_running_statistics(model, local_data(config, client).x, batch_statistics=True)
        uniform = torch.zeros(1, 4)
        found = served_accuracy(model, views, data.y_test, shares[[client]], uniform)
        accuracies.append(found.plain[0])
    found = measure_served(own, outcome.strategy)
    assert found["served"]["mean"] == pytest.approx(np.mean(accuracies), abs=1e-5)
    assert found["served"]["worst"] == pytest.approx(min(accuracies), abs=1e-5)
    assert found != measure_served(keys, outcome.strategy)


def test_clients_that_share_a_model_are_scored_at_once(
    base: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def counting(*arguments: Any) -> served.Served:
        asked.append(len(arguments[3]))
        return served_accuracy(*arguments)

    outcome = run_locally({**base, "output-dir": str(tmp_path)})
    monkeypatch.setattr(served, "served_accuracy", counting)
    measure_served(base, outcome.strategy)
    assert asked == [CLIENTS, *[1] * CLIENTS]


def test_a_row_has_it_if_asked_for_and_the_reason_if_it_fails(
    base: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def row(name: str, **keys: Any) -> dict[str, Any]:
        return run_cell({**base, "output-dir": str(tmp_path / name)}, IN_PROCESS, 1, 0.0, **keys)

    assert set(row("asked", served=True)["served"]) == set(served.NAMES)
    assert "served" not in row("plain")

    def failing(*_: object) -> None:
        raise RuntimeError("out of luck")

    monkeypatch.setattr(served, "served_accuracy", failing)
    failed = row("failed", served=True)
    assert failed["served"] == {"missing": "RuntimeError: out of luck"}
    assert failed["digest"]


SUITE = """
[[groups]]
name = "main"
served = true
strategies = ["fedavg"]
datasets = ["mnist-5k"]
models = ["lenet"]
partitions = ["iid"]
seeds = [0]
[[groups]]
name = "more"
strategies = ["fedavg"]
datasets = ["mnist-5k"]
models = ["lenet"]
partitions = ["iid"]
seeds = [0]
"""


def test_a_suite_asks_for_it_by_group(tmp_path: Path) -> None:
    first, second = parse_suite(SUITE, "mine").cells({})
    assert first.job(Machine(tmp_path)).arguments["served"] is True
    assert second.job(Machine(tmp_path)).arguments["served"] is False
    assert first.config == second.config
