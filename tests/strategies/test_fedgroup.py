# SPDX-License-Identifier: Apache-2.0
"""FedGroup: the measure, the cold start and the aggregation between groups."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedfusion_flwr.strategies import FedGroup
from fedfusion_flwr.strategies.fedgroup import decomposed_cosines
from tests.strategies.planted import QUIET, PlantedClients, flat, run_planted, start_state

FAST = settings(max_examples=50, deadline=None, derandomize=True)
cases = st.tuples(st.integers(2, 8), st.integers(0, 10**6))


def updates(case: tuple[int, int]) -> torch.Tensor:
    count, seed = case
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 30, generator=generator, dtype=torch.float64)


@FAST
@given(cases)
def test_with_all_dimensions_the_measure_is_the_angle(case: tuple[int, int]) -> None:
    """EDC(i, j)^2 = 2 - 2 cos(D_i, D_j)."""
    rows = updates(case)
    embedded = decomposed_cosines(rows @ rows.T, len(rows))
    unit = rows / rows.norm(dim=1, keepdim=True)
    expected = (2 - 2 * unit @ unit.T).clamp_min(0)
    torch.testing.assert_close(torch.cdist(embedded, embedded) ** 2, expected, atol=1e-9, rtol=1e-9)


@FAST
@given(cases)
def test_it_is_the_cosine_with_the_left_singular_vectors(case: tuple[int, int]) -> None:
    """As the paper computes it, up to the signs of the columns; no row is longer than 1."""
    rows = updates(case)
    left, _, _ = torch.linalg.svd(rows.T, full_matrices=False)
    cosines = torch.nn.functional.cosine_similarity(
        rows.unsqueeze(1), left[:, :2].T.unsqueeze(0), dim=2
    )
    embedded = decomposed_cosines(rows @ rows.T, 2)
    torch.testing.assert_close(embedded.abs(), cosines.abs(), atol=1e-8, rtol=1e-8)
    assert embedded.norm(dim=1).max() <= 1 + 1e-9


@FAST
@given(cases, st.floats(1e-3, 1e3))
def test_common_scaling_changes_nothing(case: tuple[int, int], scale: float) -> None:
    rows = updates(case)
    one, other = (decomposed_cosines(gram, 2) for gram in (rows @ rows.T, scale**2 * rows @ rows.T))
    torch.testing.assert_close(one.abs(), other.abs(), atol=1e-7, rtol=1e-7)


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
    asked = [
        (server_round, client, settings["max-steps"])
        for _, server_round, client, _, settings in clients.sent
        if settings.get("phase") == "cold-start"
    ]
    first = [client for server_round, client, _ in asked[:6]]
    assert len(set(first)) == 6
    assert {steps for *_, steps in asked} == {8}
    # Each client is asked once, before it trains in a round.
    pretrained = [client for _, client, _ in asked]
    assert len(pretrained) == len(set(pretrained))
    assert strategy.state.clusters.of.keys() == set(pretrained)
    sent = [state for *_, state, settings in clients.sent if "phase" in settings]
    assert all(torch.equal(flat(state), flat(start_state())) for state in sent)


def test_zero_updates_have_no_direction_and_do_no_harm() -> None:
    """Clients 3 and 4 send back what they were sent."""

    class Idle(PlantedClients):
        def update(self, client: int, server_round: int) -> torch.Tensor:
            return super().update(client, server_round) * (client < 3)

    strategy = fedgroup()
    outcome = run_planted(strategy, Idle(group_of), 5, rounds=2)
    assert strategy.state.clusters.of.keys() == set(range(5))
    group = strategy.state.clusters.of
    assert group[0] == group[2] != group[1]
    assert all(value.isfinite().all() for value in outcome.state.values())
    idle = fedgroup()
    run_planted(idle, PlantedClients(group_of, step=0.0), 4, rounds=2)
    assert idle.state.clusters.models == []


@pytest.mark.parametrize("rate", [0.0, 0.5])
def test_identical_groups_stay_as_they_are(rate: float) -> None:
    strategy = fedgroup(inter_group_rate=rate)
    strategy.state.clusters.models = [start_state(), start_state()]
    for mixed in strategy.mixed_groups():
        torch.testing.assert_close(flat(mixed), flat(start_state()))


def test_aggregation_between_groups_by_hand() -> None:
    """w_0 + eta w_1 / ||w_1||, over 1 + eta / ||w_1||; norms 5 and 10, eta 5: weights 1 and 1/2."""
    strategy = fedgroup(inter_group_rate=5.0)
    strategy.state.clusters.models = [
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
    distance = [
        float((flat(models["c0"]) - flat(models["c1"])).norm()) for models in (plain, mixed)
    ]
    assert distance[1] < distance[0]


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
        strategy.state.clusters.models = models
        assert float(strategy.mixed_groups()[0]["n.running_var"]) == pytest.approx(expected)
