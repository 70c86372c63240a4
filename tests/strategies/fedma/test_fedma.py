# SPDX-License-Identifier: Apache-2.0
"""FedMA's passes over a model of two layers: what is sent, and what becomes of the replies."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fedfusion_flwr.errors import FedFusionError
from fedfusion_flwr.strategies import FedMA
from tests.strategies.fedma.matched import NETWORK, OUT, other_state, run_fedma, trained
from tests.strategies.planted import Listener
from tests.support import (
    COUNTER,
    WEIGHT,
    FakeClient,
    State,
    TamperingGrid,
    assert_identical,
    tiny_model,
)


def test_one_pass_by_hand() -> None:
    """Aligned clients: layer 1 is their plain mean, layer 2 weighs by examples of each class."""
    client = Listener()
    outcome = run_fedma(client, 3, matching_width="fixed")
    start = tiny_model().state_dict()
    offsets = torch.tensor([0.01, 0.02, 0.03])
    torch.testing.assert_close(outcome.state[WEIGHT], start[WEIGHT] + offsets.mean())
    assert outcome.state[COUNTER] == 1
    # Examples 10, 20, 30; of class 1: 0, 1, 2. Each trained twice.
    counts = torch.tensor([[10.0, 0.0], [19.0, 1.0], [28.0, 2.0]])
    moved = (2 * offsets[:, None] * counts).sum(0) / counts.sum(0)
    torch.testing.assert_close(outcome.state[OUT], start[OUT] + moved[:, None])
    torch.testing.assert_close(outcome.state["out.bias"], start["out.bias"] + moved)
    for _, _, settings in client.sent_for("train", 1):
        assert not settings.keys() & {"frozen", "class-counts"}
    frozen = [key for key in start if not key.startswith("out.")]
    for partition, received, settings in client.sent_for("train", 2):
        assert settings["class-counts"] is True
        assert sorted(settings["frozen"]) == sorted(frozen)
        # Every client gets the matched layer, and its own one above it.
        matched = {key: received[key] for key in frozen}
        assert_identical(matched, {key: outcome.state[key] for key in frozen})
        assert_identical({OUT: received[OUT]}, {OUT: trained(start, partition)[OUT]})


def test_the_model_changes_at_the_end_of_a_pass_only() -> None:
    outcome = run_fedma(FakeClient(), 3, rounds=5)
    models = [report.model for report in outcome.reports]
    for server_round in (1, 3, 5):
        assert_identical(models[server_round], models[server_round - 1])
    assert not torch.equal(models[2][WEIGHT], models[1][WEIGHT])
    assert not torch.equal(models[4][WEIGHT], models[2][WEIGHT])
    assert_identical(outcome.state, models[4])
    metrics = [outcome.train_metrics(r) for r in range(1, 6)]
    assert [(m["pass"], m["layer"]) for m in metrics] == [(1, 1), (1, 2), (2, 1), (2, 2), (3, 1)]


@pytest.mark.parametrize(("every", "rounds"), [(1, [2, 4, 5]), (2, [4, 5])])
def test_clients_evaluate_at_the_end_of_passes(every: int, rounds: list[int]) -> None:
    client = Listener()
    run_fedma(client, 2, rounds=5, fraction_evaluate=1.0, evaluate_every=every)
    assert client.rounds_of("evaluate") == rounds


def test_every_client_starts_from_its_own_network() -> None:
    client = Listener()
    outcome = run_fedma(client, 3, rounds=3, initial_state=other_state, matching_gamma=1e30)
    for partition, received in client.states_for("train", 1).items():
        assert_identical(received, other_state(partition + 1))
    # The units all differ: none is shared, and layer 2 has 6 inputs.
    assert outcome.train_metrics(1)["layer-width"] == 6
    assert {k: tuple(v.shape) for k, v in outcome.state.items()} == {
        "fc.weight": (6, 2),
        **{f"norm.{name}": (6,) for name in ("weight", "bias", "running_mean", "running_var")},
        COUNTER: (),
        "out.weight": (2, 6),
        "out.bias": (2,),
    }
    # In the second layer's round a client's inputs are where its units went; the others are zero.
    wide = client.states_for("train", 2)[1]
    own = trained(other_state(2), 1)
    columns = [j for j in range(6) if bool((wide[OUT][:, j] != 0).any())]
    assert len(columns) == 2
    first = [torch.where((wide[WEIGHT] == row).all(1))[0].item() for row in own[WEIGHT]]
    assert sorted(first) == columns
    assert torch.equal(wide[OUT][:, first], own[OUT])
    # The next pass begins with the client's own units of the global network, in their old order.
    again = client.states_for("train", 3)[1]
    assert torch.equal(again[WEIGHT], own[WEIGHT])
    assert torch.equal(again[OUT], outcome.state[OUT][:, first])


def test_newcomers_get_the_units_of_most_members() -> None:
    """Two clients of three train in a pass; the third comes with the second pass."""
    client = Listener()
    grid = TamperingGrid(client, 3)
    run_fedma(client, 3, rounds=6, grid=grid, fraction_train=0.67, seed=1)
    received = [client.states_for("train", number) for number in range(1, 7)]
    cohorts = [frozenset(states) for states in received]
    assert all(len(cohort) == 2 for cohort in cohorts)
    assert cohorts[0] == cohorts[1]
    assert cohorts[2] == cohorts[3]
    assert len(set(cohorts)) > 1
    shapes = {key: value.shape for key, value in tiny_model().state_dict().items()}
    for state in [*received[2].values(), *received[4].values()]:
        assert {key: value.shape for key, value in state.items()} == shapes


def test_common_units_are_those_of_most_members() -> None:
    """Clients 0 and 1 share two units, client 2 has two of its own: newcomers get the shared."""

    def start(number: int) -> State:
        signs = 50 * torch.eye(2) * (-1 if number == 1 else 1)
        norm = {"norm.bias": torch.zeros(2), "norm.weight": torch.ones(2)}
        return {**tiny_model().state_dict(), WEIGHT: signs, **norm}

    outcome = run_fedma(FakeClient(), 3, initial_state=start)
    strategy = outcome.strategy
    assert isinstance(strategy, FedMA)
    assert outcome.train_metrics(1)["layer-width"] == 4
    members = np.bincount(np.concatenate([units[0] for units in strategy.state.units_of.values()]))
    assert sorted(members.tolist()) == [1, 1, 2, 2]
    assert members[strategy.state.common_units[0]].tolist() == [2, 2]


def test_a_run_without_a_whole_pass_is_refused() -> None:
    with pytest.raises(FedFusionError, match=r"num-server-rounds = 1 .* the model's 2 layers"):
        run_fedma(FakeClient(), 2, rounds=1)


def test_rounds_that_do_not_complete_a_pass_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="flwr"):
        run_fedma(FakeClient(), 2, rounds=5, matching_width="fixed")
        log = caplog.text
        caplog.clear()
        run_fedma(FakeClient(), 2, rounds=4)
    assert "the last 1 of 5 rounds do not complete a pass" in log
    assert "fixed width: a deviation from the paper" in log
    assert "do not complete a pass" not in caplog.text
    assert "variable width, gamma 0.001" in caplog.text


def test_settings_that_do_not_fit_are_refused() -> None:
    with pytest.raises(FedFusionError, match="give it network"):
        FedMA()
    with pytest.raises(FedFusionError, match=r"average_decay = 0.5 must be 0"):
        FedMA(network=NETWORK, average_decay=0.5)
