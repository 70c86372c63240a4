# SPDX-License-Identifier: Apache-2.0
"""Which model each strategy sends to which client to be evaluated there."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fedfusion_flwr import protocol
from fedfusion_flwr.federation.in_process_grid import InProcessGrid
from fedfusion_flwr.federation.strategy import FederatedStrategy
from fedfusion_flwr.fusion import DistributionInference, FusionPosterior
from fedfusion_flwr.strategies import (
    IFCA,
    FedAvg,
    FedCluster,
    FedClusterCycling,
    FedFusion,
    FedGroup,
    FedProx,
    FeSEM,
)
from tests.strategies.planted import (
    QUIET,
    Listener,
    PlantedClients,
    flat,
    run_planted,
    start_state,
)
from tests.support import After, assert_identical, honest_state, initial_arrays

CLIENTS = 6


def group_of(client: int) -> int:
    return client % 3


def built(strategy: type[FederatedStrategy], **settings: Any) -> Any:
    return strategy(**{**QUIET, "fraction_evaluate": 1.0, **settings})


@pytest.mark.parametrize(
    ("strategy", "settings"),
    [
        (FedAvg, {}),
        (FedAvg, {"average_decay": 0.9}),
        (FedProx, {}),
        (FedClusterCycling, {"num_clusters": 1}),
        (FedCluster, {"cluster_round": 2}),
    ],
)
def test_one_model_serves_all_clients(
    strategy: type[FederatedStrategy], settings: dict[str, Any]
) -> None:
    """The moving average, if there is one; FedCluster has one model before its clusters."""
    clients = PlantedClients(group_of)
    outcome = run_planted(built(strategy, **settings), clients, CLIENTS, rounds=3)
    for server_round in (1, 2):
        sent = clients.states_for("evaluate", server_round)
        assert list(sent) == list(range(CLIENTS))
        for state in sent.values():
            assert_identical(state, outcome.reports[server_round].model)
    newest, served = clients.states_for("train", 3)[0], outcome.reports[2].model
    assert torch.equal(flat(newest), flat(served)) == ("average_decay" not in settings)


@pytest.mark.parametrize(
    "strategy",
    [
        built(FeSEM, num_clusters=3),
        built(FedCluster, num_clusters=3, cluster_round=1),
        built(FedGroup, num_clusters=3),
    ],
    ids=lambda s: type(s).__name__,
)
def test_a_cluster_is_served_its_mean_and_others_the_global_model(strategy: Any) -> None:
    """By hand from the replies: in round 3 every cluster's model is the mean of its members'."""
    clients = PlantedClients(group_of)
    grid = InProcessGrid(clients, CLIENTS)

    late = {"partition-id": CLIENTS, "num-partitions": CLIENTS + 1}
    strategy.callbacks.append(After({3: lambda: grid.add_node(late)}))
    outcome = run_planted(strategy, clients, CLIENTS, rounds=3, grid=grid)
    sent = clients.states_for("train", 3)
    trained = [flat(sent[k]) + clients.update(k, 3).double() for k in range(CLIENTS)]
    means = [torch.stack(trained[g::3]).mean(0) for g in range(3)]
    for client, state in clients.states_for("evaluate", 3).items():
        torch.testing.assert_close(flat(state), means[group_of(client)], rtol=1e-5, atol=1e-5)
    overall = torch.stack(means).mean(0)
    torch.testing.assert_close(flat(outcome.state), overall, rtol=1e-5, atol=1e-5)
    assert_identical(strategy.personal_model(CLIENTS), outcome.state)


def test_ifca_sends_the_updated_models() -> None:
    clients = PlantedClients(group_of)
    strategy = built(IFCA, num_clusters=3, initial_state=start_state)
    run_planted(strategy, clients, CLIENTS, rounds=4)
    for _, state, settings in clients.sent_for("evaluate", 4):
        assert settings["num-models"] == 3
        for name, model in protocol.unpack_states(state).items():
            assert_identical(model, strategy.models()[name])


SHARES = torch.tensor([[0.7, 0.3, 0.0], [0.2, 0.8, 0.0], [0.55, 0.45, 0.0]], dtype=torch.float64)


class SoftInference(DistributionInference):
    """Three clients in two of three components, by the table above."""

    def fit(self, vectors: Tensor, num_examples: Tensor, **_: Any) -> FusionPosterior:
        b = SHARES[: len(vectors)]
        components = torch.zeros(3, vectors.shape[1], dtype=torch.float64)
        return FusionPosterior(b, b.mean(0), components, 0.0, clear_groups=True)


def test_fedfusion_serves_the_clients_mixture_of_component_models_by_hand() -> None:
    """sum_m b_km w_m with w_m = sum_j (n_j b_jm / B_m) w_j, examples 10, 20, 30.

    Component 2 is empty. A client that joins after the round is served the global model.
    """
    settings = {"inference": SoftInference(3), "assignment_smoothing": 0.0}
    strategy = built(FedFusion, num_components=3, **settings)
    client = Listener()
    result = strategy.start(InProcessGrid(client, 3), initial_arrays(), 1)
    sent = client.states_for("evaluate", 1)
    start = protocol.state_from_record(initial_arrays())
    replies = [honest_state(start, k) for k in range(3)]
    mass = torch.tensor([10.0, 20.0, 30.0], dtype=torch.float64).unsqueeze(1) * SHARES
    coefficients = mass / mass.sum(0).clamp_min(1e-12)
    for key in ("fc.weight", "norm.weight", "norm.running_mean", "out.bias"):
        stacked = torch.stack([reply[key].double() for reply in replies])
        expected = torch.einsum("jm,km,k...->j...", SHARES, coefficients, stacked)
        found = torch.stack([sent[k][key].double() for k in range(3)])
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)
    assert set(strategy.models()) == {"m0", "m1"}
    served = protocol.state_from_record(result.arrays)
    assert_identical(strategy.personal_model(77), served)


def test_evaluation_is_due_periodically_and_in_the_last_round() -> None:
    clients = PlantedClients(group_of)
    outcome = run_planted(built(FedAvg, evaluate_every=3), clients, 2, rounds=7)
    assert clients.rounds_of("evaluate") == [3, 6, 7]
    assert not outcome.result.evaluate_metrics_clientapp  # these clients report none
    valid = [r.server_round for r in outcome.reports if "evaluate-replies-valid" in r.metrics]
    assert valid == [3, 6, 7]
