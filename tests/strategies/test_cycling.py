# SPDX-License-Identifier: Apache-2.0
"""FedCluster by cycling: the schedule, and what it computes."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from fedfusion_flwr.federation.in_process_grid import InProcessGrid
from fedfusion_flwr.strategies import FedClusterCycling
from tests.strategies.planted import QUIET, PlantedClients, flat, run_planted, start_state
from tests.strategies.small import initial_model, small_config, train_for_real
from tests.support import After, Outcome


def cycling(**settings: Any) -> FedClusterCycling:
    return FedClusterCycling(**{**QUIET, **settings})


def cohorts(outcome: Outcome) -> list[list[int]]:
    return [[row.client for row in r.clients] for r in outcome.reports[1:]]  # type: ignore[misc]


def learning_rounds(cohorts: list[list[int]], length: int) -> list[list[list[int]]]:
    return [cohorts[start : start + length] for start in range(0, len(cohorts), length)]


@pytest.mark.parametrize(("num_clients", "num_clusters"), [(10, 3), (7, 7), (5, 9), (6, 1)])
def test_clusters_are_disjoint_cover_all_clients_and_have_one_size(
    num_clients: int, num_clusters: int
) -> None:
    strategy = cycling(num_clusters=num_clusters)
    cycles = min(num_clusters, num_clients)
    outcome = run_planted(strategy, PlantedClients(), num_clients, rounds=3 * cycles)
    members = sorted(client for cluster in strategy.state.clusters for client in cluster)
    assert members == list(range(num_clients))
    sizes = {len(cluster) for cluster in strategy.state.clusters}
    assert max(sizes) - min(sizes) <= 1
    assert len(strategy.state.clusters) == cycles
    for turns in learning_rounds(cohorts(outcome), cycles):
        assert sorted(itertools.chain(*turns)) == list(range(num_clients))
    metrics = [(r.metrics["learning-round"], r.metrics["cycle"]) for r in outcome.reports[1:]]
    assert metrics == [(1 + i // cycles, 1 + i % cycles) for i in range(3 * cycles)]


def test_a_fraction_of_each_cluster_trains_once_a_learning_round() -> None:
    outcome = run_planted(
        cycling(num_clusters=3, fraction_train=0.5), PlantedClients(), 12, rounds=12
    )
    assert {len(cohort) for cohort in cohorts(outcome)} == {2}
    for turns in learning_rounds(cohorts(outcome), 3):
        assert len({*itertools.chain(*turns)}) == 6


def test_order_is_new_in_every_learning_round_or_fixed() -> None:
    def orders(reshuffle: bool) -> set[tuple[int, ...]]:
        strategy = cycling(num_clusters=4, reshuffle_cycle=reshuffle)
        rounds = cohorts(run_planted(strategy, PlantedClients(), 4, rounds=24))
        return {tuple(itertools.chain(*turns)) for turns in learning_rounds(rounds, 4)}

    assert len(orders(True)) > 1
    assert len(orders(False)) == 1


def test_one_client_a_cluster_is_sequential_training() -> None:
    """Each starts from its predecessor's exact model: start + update + update + ..."""
    clients = PlantedClients(lambda client: client)
    strategy = cycling(num_clusters=4, reshuffle_cycle=False)
    outcome = run_planted(strategy, clients, 4, rounds=4)
    model = flat(start_state()).float()
    for server_round, (client,) in enumerate(cohorts(outcome), 1):
        ((_, sent, _),) = clients.sent_for("train", server_round)
        assert torch.equal(flat(sent).float(), model)
        model = model + clients.update(client, server_round)
    assert torch.equal(flat(outcome.state).float(), model)


@pytest.mark.usefixtures("small")
def test_order_matters_to_the_model_but_not_to_who_trains() -> None:
    def learn(reshuffle: bool) -> Outcome:
        settings = {"num_clusters": 3, "reshuffle_cycle": reshuffle, "seed": 1}
        return train_for_real(small_config(strategy="fedcluster-cycling", **settings))

    fixed, shuffled = learn(False), learn(True)
    assert cohorts(fixed) != cohorts(shuffled)
    assert sorted(map(tuple, cohorts(fixed))) == sorted(map(tuple, cohorts(shuffled)))
    assert not torch.equal(fixed.state["1.weight"], shuffled.state["1.weight"])


@pytest.mark.usefixtures("small")
def test_in_the_limit_of_small_steps_a_learning_round_is_m_rounds_of_fedavg() -> None:
    """One full-batch step, equal clients: ||D_cycling - M D_FedAvg|| / ||D_FedAvg|| ~ rate."""

    def deviation(rate: float) -> float:
        shared: dict[str, Any] = {
            "partition": "iid",
            "num_clients": 4,
            "model": "resnet18",
            "batch_size": 99,
            "momentum": 0.0,
            "weight_decay": 0.0,
            "learning_rate": rate,
        }
        two = {"num_clusters": 2, "num_server_rounds": 2}
        cycled = small_config(strategy="fedcluster-cycling", **two, **shared)
        once = small_config(strategy="fedavg", num_server_rounds=1, **shared)
        start = flat(initial_model(once))
        step = flat(train_for_real(once).state) - start
        steps = flat(train_for_real(cycled).state) - start
        return float((steps - 2 * step).norm() / step.norm())

    coarse, fine = deviation(0.1), deviation(0.001)
    assert fine < 0.1 * coarse
    assert fine < 0.03


def test_clients_evaluate_at_the_end_of_learning_rounds_and_of_the_run() -> None:
    clients = PlantedClients()
    strategy = cycling(num_clusters=3, fraction_evaluate=1.0, evaluate_every=2)
    run_planted(strategy, clients, 6, rounds=14)
    assert clients.rounds_of("evaluate") == [6, 12, 14]


def test_late_clients_join_the_smallest_cluster_and_an_empty_turn_goes_to_all() -> None:
    """Five clients in clusters of 3 and 2; the sixth joins the latter. Then a cluster leaves."""
    clients = PlantedClients()
    grid = InProcessGrid(clients, 5)
    node_of = {c.node_config["partition-id"]: node for node, c in grid.contexts.items()}
    strategy = cycling(num_clusters=2, reshuffle_cycle=False)

    def join() -> None:
        assert sorted(map(len, strategy.state.clusters)) == [2, 3]
        grid.add_node({"partition-id": 5, "num-partitions": 6})

    def leave() -> None:
        for client in set(strategy.state.clusters[0]) - {5}:
            grid.remove_node(node_of[client])

    strategy.callbacks.append(After({2: join, 4: leave}))
    outcome = run_planted(strategy, clients, 5, rounds=6, grid=grid)
    assert sorted(map(len, strategy.state.clusters)) == [3, 3]
    assert 5 in strategy.state.clusters[1]
    rounds = cohorts(outcome)
    assert set(rounds[4]) == set(rounds[5]) == set(strategy.state.clusters[1])
