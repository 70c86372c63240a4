# SPDX-License-Identifier: Apache-2.0
"""Planted mixtures, reported with noise over rounds through the server's memory, are recovered."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pytest
import torch
from sklearn.metrics import adjusted_rand_score
from torch import Tensor

from fedfusion_flwr.fusion import DistributionInference, FusionPosterior, StatisticsMemory
from fedfusion_flwr.fusion import inference as inference_module
from fedfusion_flwr.tracking.recovery import assignment_error

pytestmark = pytest.mark.rounding

SEEDS = range(6)
CLIENTS, COMPONENTS, WIDTH, ROUNDS = 20, 5, 60, 20


class World(NamedTuple):
    """True memberships (K, 5), and what the server remembers after the rounds."""

    memberships: Tensor
    memory: StatisticsMemory


def reported(memberships: Tensor, seed: int, fades_after: int | None = None) -> World:
    """Rounds of a drifting level, mixtures of standard normal components, and correlated noise.

    One round's noise is of variance 1 in a feature, as large as a component's. From the round
    ``fades_after`` on the clients' differences are a twentieth.
    """
    rng = np.random.default_rng(seed)
    clients, count = memberships.shape
    deviations = memberships @ torch.as_tensor(rng.normal(size=(count, WIDTH)))
    mix = torch.as_tensor(rng.normal(size=(WIDTH, WIDTH))) / WIDTH**0.5
    memory = StatisticsMemory()
    for server_round in range(1, ROUNDS + 1):
        faded = fades_after is not None and server_round > fades_after
        noise = torch.as_tensor(rng.normal(size=(clients, WIDTH))) @ mix
        rows = 0.3 * server_round + (0.05 if faded else 1) * deviations + noise
        memory.remember(server_round, dict(enumerate(rows)), dict.fromkeys(range(clients), 100))
    return World(memberships, memory)


def dirichlet(concentration: float, seed: int) -> Tensor:
    rng = np.random.default_rng(1000 + seed)
    return torch.as_tensor(rng.dirichlet([concentration] * COMPONENTS, CLIENTS))


def infer(memory: StatisticsMemory, seed: int) -> FusionPosterior:
    """With up to eight components: their number is not given."""
    return DistributionInference(8, seed).fit(
        memory.vectors(),
        memory.num_examples(),
        rounds=memory.rounds(),
        residuals=memory.residuals,
    )


def total_variation(found: Tensor, true: Tensor) -> float:
    """Mean over the clients, with components matched for the least."""
    return assignment_error(true.numpy(), found.numpy())


@pytest.mark.parametrize("concentration", [0.3, 0.6])
def test_planted_mixtures_are_recovered_better_than_by_archetypes(
    concentration: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    starts: list[Tensor] = []
    archetypes = inference_module.archetypes

    def watched(x: Tensor, count: int) -> Tensor:
        starts.append(archetypes(x, count))
        return starts[-1]

    monkeypatch.setattr(inference_module, "archetypes", watched)
    errors, before, after = [], [], []
    for seed in SEEDS:
        world = reported(dirichlet(concentration, seed), seed)
        starts.clear()
        errors.append(total_variation(infer(world.memory, seed).assignments, world.memberships))
        if starts:
            before.append(total_variation(starts[0], world.memberships))
            after.append(errors[-1])
    assert np.mean(errors) <= 0.2, errors
    assert len(before) >= 3
    assert np.mean(after) < np.mean(before) - 0.02, (after, before)


@pytest.mark.parametrize("seed", SEEDS)
def test_pure_clients_are_recovered_as_pure(seed: int) -> None:
    pure = torch.eye(COMPONENTS).double()[torch.arange(CLIENTS) % COMPONENTS]
    fit = infer(reported(pure, seed).memory, seed)
    assert total_variation(fit.assignments, pure) <= 0.03


@pytest.mark.parametrize("seed", SEEDS)
def test_noise_over_rounds_alone_is_one_component(seed: int) -> None:
    fit = infer(reported(torch.zeros(CLIENTS, 1).double(), seed).memory, seed)
    assert fit.assignments[:, 0].tolist() == [1.0] * CLIENTS


@pytest.mark.parametrize("seed", SEEDS)
def test_what_was_recovered_stays_recovered(seed: int) -> None:
    """The groups' differences fade after round 8 of 20, as training brings the clients together."""
    groups = torch.arange(CLIENTS) % 4
    world = reported(torch.eye(4).double()[groups], seed, fades_after=8)
    found = infer(world.memory, seed).assignments.argmax(1)
    assert adjusted_rand_score(groups, found) == 1.0


def entropy(b: Tensor) -> float:
    return float(-(b * b.clamp_min(1e-12).log()).sum())


def test_a_client_seen_once_has_softer_memberships_than_the_same_seen_often() -> None:
    """Of the same statistics; only the number of rounds behind the last client's differs."""
    gains = []
    for seed in SEEDS:
        memory = reported(0.5 * dirichlet(0.6, seed), seed).memory
        entropies = []
        for rounds in (1, ROUNDS):
            memory.clients[CLIENTS - 1].rounds = rounds
            entropies.append(entropy(infer(memory, seed).assignments[-1]))
        gains.append(entropies[0] - entropies[1])
    assert sum(gain > 0 for gain in gains) >= 5, gains
    assert np.mean(gains) > 0.1, gains
