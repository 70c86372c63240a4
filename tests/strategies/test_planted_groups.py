# SPDX-License-Identifier: Apache-2.0
"""FeSEM, FedGroup and FedCluster find planted groups of updates, and newcomers join theirs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from flwr.app import Context, Message

from fedfusion_flwr.federation.in_process_grid import InProcessGrid
from fedfusion_flwr.federation.replies import ClientReply
from fedfusion_flwr.federation.strategy import FederatedStrategy
from fedfusion_flwr.strategies import FedCluster, FedGroup, FeSEM
from tests.strategies.planted import QUIET, PlantedClients, flat, run_planted, same_partition
from tests.support import After, assert_identical

CLIENTS, GROUPS = 12, 3


def group_of(client: int) -> int:
    """Groups of unequal size, not in the order of the clients."""
    return (0, 1, 2, 0, 0, 1)[client % 6]


KNOWN: dict[str, tuple[type[FederatedStrategy], dict[str, Any]]] = {
    "fesem": (FeSEM, {}),
    "fedgroup": (FedGroup, {}),
    "fedcluster": (FedCluster, {"cluster_round": 1}),
    "fedcluster, threshold": (FedCluster, {"cluster_round": 1, "distance_threshold": 8.0}),
    "fedcluster, complete": (FedCluster, {"cluster_round": 1, "linkage": "complete"}),
    "fedcluster, average": (FedCluster, {"cluster_round": 1, "linkage": "average"}),
}
every_finder = pytest.mark.parametrize("name", ["fesem", "fedgroup", "fedcluster"])


@dataclass
class Choosy(PlantedClients):
    """Answers only where ``answers`` of client, round and settings says so."""

    answers: Callable[[int, int, dict[str, Any]], bool] = lambda *_: True

    def hear(self, message: Message, context: Context) -> Any:
        client, server_round, received, settings = super().hear(message, context)
        assert self.answers(client, server_round, settings), "silent"
        return client, server_round, received, settings


def finder(name: str, seed: int = 0, **settings: Any) -> FederatedStrategy:
    strategy, own = KNOWN[name]
    return strategy(**{"seed": seed, "num_clusters": GROUPS, **QUIET, **own, **settings})


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("name", KNOWN)
def test_planted_groups_are_found_exactly_and_kept(name: str, seed: int) -> None:
    strategy = finder(name, seed)
    outcome = run_planted(strategy, PlantedClients(group_of, seed), CLIENTS, rounds=4)
    assert strategy.clusters.of.keys() == set(range(CLIENTS))
    assert same_partition(strategy.clusters.of, group_of)
    assert len(strategy.clusters.models) == GROUPS
    assert outcome.reports[3].clusters == outcome.reports[4].clusters == strategy.clusters.of
    sizes = [outcome.reports[4].metrics[f"clients-of-c{c}"] for c in range(GROUPS)]
    assert sorted(sizes) == [2, 4, 6]


@every_finder
def test_newcomers_join_their_group(name: str) -> None:
    """Three clients join in round 3, one of each group."""
    clients = PlantedClients(group_of)
    grid = InProcessGrid(clients, CLIENTS)
    late = [{"partition-id": client, "num-partitions": 15} for client in (12, 13, 14)]
    strategy = finder(name)
    strategy.callbacks.append(After({2: lambda: [grid.add_node(node) for node in late]}))
    run_planted(strategy, clients, CLIENTS, rounds=4, grid=grid)
    assert strategy.clusters.of.keys() == set(range(15))
    assert same_partition(strategy.clusters.of, group_of)


def test_fedgroups_newcomer_that_goes_the_other_way_does_not_join() -> None:
    """An update equal to D_g joins g; -D_g joins any other."""
    strategy = finder("fedgroup")
    run_planted(strategy, PlantedClients(group_of), CLIENTS, rounds=1)
    assert isinstance(strategy, FedGroup)
    for group, direction in enumerate(strategy.state.directions):
        for sign in (1.0, -1.0):
            state = {k: v.double() + sign * direction[k] for k, v in strategy.state.origin.items()}
            reply = ClientReply(99, 99, 10, {}, state)
            strategy.prepare_cohort([99], lambda *_, reply=reply: [reply])
            assert (strategy.clusters.of.pop(99) == group) == (sign > 0)


@pytest.mark.parametrize("name", ["fedgroup", "fedcluster"])
def test_assignment_never_changes_though_updates_do(name: str) -> None:
    """From round 3 on all clients move in the direction of group 0."""

    class Turncoats(PlantedClients):
        def update(self, client: int, server_round: int) -> torch.Tensor:
            return super().update(client, server_round) if server_round < 3 else self.direction(0)

    strategy = finder(name)
    run_planted(strategy, Turncoats(group_of), CLIENTS, rounds=5)
    assert same_partition(strategy.clusters.of, group_of)


@every_finder
def test_unselected_groups_keep_their_model_to_the_bit(name: str) -> None:
    """Only clients of one group answer in round 4."""
    clients = Choosy(group_of, answers=lambda k, number, _: number != 4 or group_of(k) == 1)
    kept: dict[str, Any] = {}
    strategy = finder(name, **({"centre_update": "round"} if name == "fesem" else {}))
    strategy.callbacks.append(After({3: lambda: kept.update(strategy.models())}))
    outcome = run_planted(strategy, clients, CLIENTS, rounds=4)
    trained = strategy.clusters.of[1]
    for key, model in strategy.models().items():
        if key == f"c{trained}":
            assert not torch.equal(flat(model), flat(kept[key]))
        else:
            assert_identical(model, kept[key])
    assert outcome.reports[4].metrics["clusters-updated"] == 1
    assert outcome.reports[4].metrics["replies-valid"] == 4


@every_finder
def test_identical_clients_are_one_cluster(name: str) -> None:
    """Rounding in the Gram matrix's null directions must not pass for a difference."""
    same = PlantedClients(lambda _: 0, noise=0.0)
    strategy = finder(name)
    run_planted(strategy, same, CLIENTS, rounds=2)
    assert set(strategy.clusters.of.values()) == {0}
    assert len(strategy.clusters.models) == 1


@every_finder
def test_fewer_clients_than_clusters(name: str) -> None:
    for clients, clusters in ((2, {0, 1}), (1, {0})):
        strategy = finder(name, num_clusters=5)
        run_planted(strategy, PlantedClients(group_of), clients, rounds=2)
        assert set(strategy.clusters.of.values()) == clusters


@every_finder
def test_a_failed_first_exchange_is_repeated(name: str) -> None:
    """Nobody answers before round 3; FedCluster's clustering would be due in round 2."""
    clients = Choosy(group_of, answers=lambda _, number, asked: "phase" not in asked or number >= 3)
    strategy = finder(name)
    outcome = run_planted(strategy, clients, CLIENTS, rounds=4)
    assert outcome.reports[2].clusters == {}
    assert "round-failed" not in outcome.reports[2].metrics
    assert same_partition(strategy.clusters.of, group_of)
    assert outcome.reports[3].clusters == strategy.clusters.of


def test_fedcluster_samples_within_each_cluster() -> None:
    """Half of each cluster of 6, 4 and 2 clients, at least one; before that, half of them all."""
    strategy = finder("fedcluster", fraction_train=0.5)
    outcome = run_planted(strategy, PlantedClients(group_of), CLIENTS, rounds=6)
    cohorts = [[row.client for row in report.clients] for report in outcome.reports[1:]]
    assert len(cohorts[0]) == 6
    for cohort in cohorts[1:]:
        groups = [group_of(client) for client in cohort if client is not None]
        assert sorted(groups) == [0, 0, 0, 1, 1, 2]
    assert len({tuple(cohort) for cohort in cohorts[1:]}) > 1
