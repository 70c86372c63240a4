# SPDX-License-Identifier: Apache-2.0
"""FeSEM: expectation and maximization over the clients' models."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fedfusion_flwr import FedFusionError
from fedfusion_flwr.strategies import FeSEM
from tests.strategies.planted import QUIET, PlantedClients, flat, run_planted, start_state
from tests.support import assert_identical

CLIENTS = 8


def fesem(**settings: Any) -> FeSEM:
    return FeSEM(**{**QUIET, "num_clusters": 3, **settings})


class Watched(FeSEM):
    """Measures the objective before E, after E and after M."""

    def advance(self, replies: Any) -> Any:
        if not self.clusters.models:
            return super().advance(replies)
        self.values: list[list[float]] = getattr(self, "values", [])
        before = dict(self.clusters.of)
        assigned = self.assign(replies)
        now = [self.objective(before)] if before.keys() == assigned.keys() else []
        self.nearest(assigned)
        now.append(self.objective(assigned))
        model = super().advance(replies)
        self.values.append([*now, self.objective(assigned)])
        return model

    def objective(self, assigned: dict[int, int]) -> float:
        return sum(
            self.state.latest[c].num_examples * self.distance(c, cluster) ** 2
            for c, cluster in assigned.items()
        )

    def distance(self, client: int, cluster: int) -> float:
        centre = flat(self.clusters.models[cluster])
        return float((flat(self.state.latest[client].state) - centre).norm())

    def nearest(self, assigned: dict[int, int]) -> None:
        for client, cluster in assigned.items():
            by_hand = [self.distance(client, j) for j in range(len(self.clusters.models))]
            assert cluster == by_hand.index(min(by_hand))


@pytest.mark.parametrize("seed", range(3))
def test_objective_never_rises_and_assignments_are_the_nearest_centres(seed: int) -> None:
    """With overlapping groups, unequal examples and half of the clients in a round."""
    clients = PlantedClients(seed=seed, noise=1.5, examples=lambda c: 5 + 3 * c)
    strategy = Watched(num_clusters=3, seed=seed, **{**QUIET, "fraction_train": 0.5})
    run_planted(strategy, clients, CLIENTS, rounds=6)
    assert len(strategy.values) == 6
    for values in strategy.values:
        assert values == sorted(values, reverse=True)
    assert any(values[0] > values[-1] for values in strategy.values)


def test_centres_are_example_weighted_means_of_the_latest_models() -> None:
    """By hand, with half of the clients in a round: the others count with what they sent last."""
    clients = PlantedClients(examples=lambda c: 5 + 3 * c)
    strategy = fesem(fraction_train=0.5)
    run_planted(strategy, clients, CLIENTS, rounds=3)
    last: dict[int, Tensor] = {}
    for kind, server_round, client, state, _ in clients.sent:
        if kind == "train":
            last[client] = flat(state) + clients.update(client, server_round).double()
    for cluster, centre in enumerate(strategy.clusters.models):
        members = [c for c in range(CLIENTS) if strategy.clusters.of[c] == cluster]
        weights = torch.tensor([5.0 + 3 * c for c in members], dtype=torch.float64)
        mean = (weights / weights.sum()) @ torch.stack([last[c] for c in members])
        torch.testing.assert_close(flat(centre), mean, rtol=1e-5, atol=1e-5)


def test_an_empty_centre_is_unchanged() -> None:
    """Without warm start; the third initial centre is far from everything that clients send."""

    def initial(number: int) -> dict[str, Tensor]:
        factor = 50.0 if number == 2 else 1.0
        return {key: factor * value for key, value in start_state(number).items()}

    strategy = fesem(warm_start=False, initial_state=initial)
    run_planted(strategy, PlantedClients(), CLIENTS, rounds=3)
    assert 2 not in strategy.clusters.of.values()
    assert_identical(strategy.clusters.models[2], initial(2))


def test_centres_that_start_equal_are_refused() -> None:
    same = fesem(warm_start=False, initial_state=lambda _: start_state())
    with pytest.raises(FedFusionError, match="equals an earlier model; seed each differently"):
        run_planted(same, PlantedClients(), 3)


def test_without_warm_start_clients_start_from_the_global_model() -> None:
    """In round 1 nobody has a centre; afterwards each client is sent its own."""
    clients = PlantedClients()
    strategy = fesem(warm_start=False, initial_state=start_state)
    outcome = run_planted(strategy, clients, 4, rounds=2)
    for _, state, _ in clients.sent_for("train", 1):
        assert_identical(state, start_state())
    assert outcome.reports[1].clusters == dict.fromkeys(range(4), 0)
