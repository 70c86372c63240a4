# SPDX-License-Identifier: Apache-2.0
"""FedGroup: the cold start and the aggregation between groups."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fedfusion_flwr.strategies import FedGroup
from tests.strategies.planted import QUIET, PlantedClients, flat, run_planted, start_state


def group_of(client: int) -> int:
    return client % 2


def fedgroup(**own: Any) -> FedGroup:
    return FedGroup(**{**QUIET, "num_clusters": 2, **own})


def test_group_models_are_uniform_means_and_directions_those_of_the_updates() -> None:
    """By hand, for unequal examples: they do not matter in the cold start."""
    clients = PlantedClients(group_of, examples=lambda c: 1 + 10 * c)
    strategy = fedgroup(fraction_train=0.2)
    run_planted(strategy, clients, 5, rounds=1)
    for group, members in enumerate(([0, 2, 4], [1, 3])):
        mean = torch.stack([clients.update(c, 1).double() for c in members]).mean(0)
        torch.testing.assert_close(
            flat(strategy.state.directions[group]), mean, atol=1e-5, rtol=1e-5
        )


def test_cold_start_takes_alpha_clients_per_group_and_the_others_are_newcomers() -> None:
    clients = PlantedClients(group_of)
    strategy = fedgroup(pretrain_clients=3, pretrain_steps=8, fraction_train=0.5)
    run_planted(strategy, clients, 20, rounds=4)
    asked = [row[1:] for row in clients.sent if row[-1].get("phase") == "cold-start"]
    # Each client is asked once, before it trains in a round.
    pretrained = [client for _, client, *_ in asked]
    assert len(pretrained) == len(set(pretrained)) > 6
    assert strategy.clusters.of.keys() == set(pretrained)
    for _, _, state, settings in asked:
        assert settings["max-steps"] == 8
        assert torch.equal(flat(state), flat(start_state()))


def test_zero_updates_have_no_direction_and_do_no_harm() -> None:
    """Clients 3 and 4 send back what they were sent."""

    class Idle(PlantedClients):
        def update(self, client: int, server_round: int) -> torch.Tensor:
            return super().update(client, server_round) * (client < 3)

    strategy = fedgroup()
    outcome = run_planted(strategy, Idle(group_of), 5, rounds=2)
    assert strategy.clusters.of.keys() == set(range(5))
    group = strategy.clusters.of
    assert group[0] == group[2] != group[1]
    assert all(value.isfinite().all() for value in outcome.state.values())
    idle = fedgroup()
    run_planted(idle, PlantedClients(group_of, step=0.0), 4, rounds=2)
    assert idle.clusters.models == []


@pytest.mark.parametrize("rate", [0.0, 0.5])
def test_identical_groups_stay_as_they_are(rate: float) -> None:
    strategy = fedgroup(inter_group_rate=rate)
    strategy.clusters.models = [start_state(), start_state()]
    for mixed in strategy.mixed_groups():
        torch.testing.assert_close(flat(mixed), flat(start_state()))


def test_aggregation_between_groups_by_hand() -> None:
    """w_0 + eta w_1 / ||w_1||, over 1 + eta / ||w_1||; norms 5 and 10, eta 5: weights 1 and 1/2."""
    strategy = fedgroup(inter_group_rate=5.0)
    strategy.clusters.models = [
        {"w": torch.tensor([3.0, 4.0])},
        {"w": torch.tensor([0.0, 10.0])},
    ]
    first, second = strategy.mixed_groups()
    torch.testing.assert_close(first["w"], torch.tensor([2.0, 6.0]))  # (3,4) + .5 (0,10) over 1.5
    torch.testing.assert_close(second["w"], torch.tensor([1.5, 7.0]))  # (0,10) + 1 (3,4) over 2


def test_rate_zero_leaves_the_groups_to_themselves() -> None:
    """With a positive rate the groups' models differ from those, and lie closer together."""
    runs = [
        run_planted(fedgroup(inter_group_rate=rate), PlantedClients(group_of), 6, rounds=2)
        for rate in (0.0, 0.5)
    ]
    plain, mixed = (run.strategy.models() for run in runs)
    assert not torch.equal(flat(plain["c0"]), flat(mixed["c0"]))
    apart, nearer = ((flat(m["c0"]) - flat(m["c1"])).norm() for m in (plain, mixed))
    assert nearer < apart


def test_statistics_between_groups_are_fused_as_asked() -> None:
    """Means 0 and 2, variance 1: moments give 1 + 1 in the middle, averages stay at 1."""
    models = [
        {
            "w": torch.ones(1),
            "n.weight": torch.ones(1),
            "n.bias": torch.zeros(1),
            "n.running_mean": torch.full((1,), mean),
            "n.running_var": torch.ones(1),
            "n.num_batches_tracked": torch.tensor(1),
        }
        for mean in (0.0, 2.0)
    ]
    for pool, expected in ((True, 2.0), (False, 1.0)):
        # The norm of (w, n.weight) is sqrt 2: with this rate both groups count the same.
        strategy = fedgroup(inter_group_rate=2**0.5, pool_moments=pool)
        strategy.clusters.models = models
        assert float(strategy.mixed_groups()[0]["n.running_var"]) == pytest.approx(expected)
