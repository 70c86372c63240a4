# SPDX-License-Identifier: Apache-2.0
"""IFCA: the clients' choice among the models, and how the server checks it."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from flwr.app import Message
from sklearn.metrics import adjusted_rand_score

from fedfusion_flwr import FedFusionError, RunConfig, protocol
from fedfusion_flwr.data import partition_for
from fedfusion_flwr.federation.round import State
from fedfusion_flwr.strategies import IFCA
from tests.strategies.planted import (
    QUIET,
    PlantedClients,
    flat,
    moved,
    run_planted,
    same_partition,
    start_state,
)
from tests.strategies.small import train_for_real
from tests.support import (
    COUNTER,
    FakeClient,
    Outcome,
    assert_identical,
    replace_metric,
    run_federation,
    tiny_model,
    untrained_state,
)


def ifca(**settings: Any) -> IFCA:
    defaults = {"num_clusters": 3, "warmup_rounds": 0, "initial_state": start_state}
    return IFCA(**{**QUIET, **defaults, **settings})


class Walkers(PlantedClients):
    """Clients that go half of the way from the chosen model to their group's optimum."""

    def update(self, client: int, server_round: int) -> torch.Tensor:
        *_, state, settings = self.sent[-1]
        if "num-models" in settings:
            models = list(protocol.unpack_states(state).values())
            state = models[self.choose(models, client)]
        return 0.5 * (self.direction(self.group_of(client)) - flat(state).float())


def near(order: tuple[int, ...]) -> Any:
    """Initial models: the j-th lies near the optimum of group order[j]."""
    optima = Walkers()

    def state(number: int) -> State:
        far = 0.2 * torch.randn(40, generator=torch.Generator().manual_seed(order[number]))
        zero = {key: torch.zeros_like(value) for key, value in start_state().items()}
        return moved(zero, optima.direction(order[number]) + far)

    return state


def walk(order: tuple[int, ...] = (0, 1, 2), rounds: int = 3, **settings: Any) -> Outcome:
    strategy = ifca(initial_state=near(order), **settings)
    return run_planted(strategy, Walkers(), 9, rounds, start=near(order)(0))


def test_planted_groups_choose_their_model_at_once_and_stay() -> None:
    outcome = walk(rounds=5)
    for report in outcome.reports[1:]:
        assert same_partition(report.clusters, lambda client: client % 3)
        assert report.clusters == outcome.reports[1].clusters
    for g in range(3):
        error = flat(outcome.strategy.models()[f"c{g}"]) - Walkers().direction(g)
        assert error.norm() < 0.1


def test_permuting_the_models_only_permutes() -> None:
    one, other = walk((0, 1, 2)), walk((2, 0, 1))
    for j, g in enumerate((2, 0, 1)):
        assert_identical(other.strategy.models()[f"c{j}"], one.strategy.models()[f"c{g}"])
        assert all(other.reports[3].clusters[client] == j for client in range(g, 9, 3))


def test_a_model_chosen_by_nobody_is_unchanged() -> None:
    """The fourth model is the start's number 3, far from every optimum."""
    far = start_state(7)

    def initial(number: int) -> State:
        return far if number == 3 else near((0, 1, 2))(number)

    strategy = ifca(num_clusters=4, initial_state=initial)
    run_planted(strategy, Walkers(), 9, rounds=3, start=initial(0))
    assert_identical(strategy.models()["c3"], far)
    assert strategy.round.report.metrics["clusters-updated"] == 3
    assert strategy.round.report.metrics["clients-of-c3"] == 0


def test_models_that_start_equal_are_refused() -> None:
    with pytest.raises(FedFusionError, match=r"initial_state\(1\) equals an earlier model"):
        run_planted(ifca(initial_state=lambda _: start_state()), PlantedClients(), 3)
    with pytest.raises(FedFusionError, match="give it initial_state"):
        run_planted(ifca(initial_state=None), PlantedClients(), 3)


def test_clients_are_sent_all_models_after_the_warm_up() -> None:
    clients = PlantedClients()
    run_planted(ifca(warmup_rounds=1, fraction_evaluate=1.0), clients, 4, rounds=2)
    names = list(start_state())
    packed = [f"c{j}/{name}" for j in range(3) for name in names]
    for _, state, settings in clients.sent_for("train", 1):
        assert list(state) == names
        assert "num-models" not in settings
    for kind, server_round in (("evaluate", 1), ("train", 2), ("evaluate", 2)):
        for _, state, settings in clients.sent_for(kind, server_round):
            assert list(state) == packed
            assert settings["num-models"] == 3


def test_warm_up_trains_each_model_with_a_fixed_division_of_the_clients() -> None:
    clients = PlantedClients()
    strategy = ifca(warmup_rounds=3, fraction_train=0.5)
    outcome = run_planted(strategy, clients, 12, rounds=3)
    clusters_of: dict[int | None, set[int | None]] = {}
    for report in outcome.reports[1:]:
        for row in report.clients:
            clusters_of.setdefault(row.client, set()).add(row.cluster)
        # A client that has not trained yet is in no cluster.
        assert report.clusters.keys() == clusters_of.keys()
    assert all(len(clusters) == 1 for clusters in clusters_of.values())
    assert set.union(*clusters_of.values()) == {0, 1, 2}


@pytest.mark.parametrize(
    ("named", "reason"),
    [
        *((named, "cluster") for named in (7, -1, 0.5, [0], None)),
        (math.nan, "nonfinite"),
    ],
)
def test_a_reply_that_names_no_model_is_dropped(named: Any, reason: str) -> None:
    def spoil(reply: Message) -> None:
        if named is None:
            reply.content.metric_records["metrics"].pop("cluster", None)
        else:
            replace_metric("cluster", named)(reply)

    settings = {"num_clusters": 2, "warmup_rounds": 0}
    honest = run_federation("ifca", FakeClient(), 4, **settings)
    hostile = run_federation("ifca", FakeClient(spoil, hostile=(4,)), 5, **settings)
    for report in hostile.reports[1:]:
        assert [(row.client, row.dropped) for row in report.dropped] == [(4, reason)]
    for name, model in honest.strategy.models().items():
        assert_identical(hostile.strategy.models()[name], model)


def test_replies_are_judged_against_the_model_they_were_trained_from() -> None:
    """Model 0 has five tracked batches, model 1 none: neither reply is a step backwards."""
    start = tiny_model().state_dict() | {COUNTER: torch.tensor(5)}
    strategy = IFCA(num_clusters=2, warmup_rounds=0, initial_state=untrained_state, **QUIET)
    outcome = run_planted(strategy, FakeClient(), 4, rounds=2, start=start)
    assert [row.dropped for report in outcome.reports for row in report.clients] == [None] * 8
    counters = [int(model[COUNTER]) for model in strategy.models().values()]
    assert counters == [7, 2]


def test_a_leap_is_measured_from_the_chosen_model() -> None:
    """Model 1 is a thousand times as long: a step of its length leaps from 0, not from 1."""
    small = {key: 0.001 * value for key, value in start_state(1).items()}
    clients = PlantedClients(lambda _: 0)
    clients.choose = lambda models, client: client % 2  # type: ignore[method-assign]
    strategy = ifca(num_clusters=2, initial_state=lambda _: small)
    outcome = run_planted(strategy, clients, 2, rounds=1)
    rows = {row.client: row for row in outcome.reports[1].clients}
    assert (rows[0].dropped, rows[1].dropped) == (None, "update")
    assert "times the model's norm" in str(rows[1].detail)


@pytest.mark.rounding
@pytest.mark.slow
@pytest.mark.parametrize(
    ("rotations", "clients", "warmup_rounds", "seeds", "least", "data"),
    [
        (2, 8, 2, 6, 4, {"train_examples": 2000, "batch_size": 32}),
        (4, 12, 3, 3, 1, {"batch_size": 64}),
    ],
)
def test_planted_rotations_are_recovered_and_stay(
    rotations: int,
    clients: int,
    warmup_rounds: int,
    seeds: int,
    least: int,
    data: dict[str, Any],
) -> None:
    """The authors' own task: clients whose digits are turned by different angles.

    The warm-up's division ignores them; by the second free choice they are found, or never. Whether
    they are depends on the initial models: measured, in 5 of 6 and in 2 of 3 seeds.
    """
    recovered = 0
    for seed in range(seeds):
        config = RunConfig(
            strategy="ifca",
            component_transform="rotate",
            planted_components=rotations,
            num_clusters=rotations,
            num_clients=clients,
            warmup_rounds=warmup_rounds,
            num_server_rounds=warmup_rounds + 4,
            **data,
            fraction_evaluate=0.0,
            seed=seed,
        )
        truth = partition_for(config).main_components
        assert truth is not None
        agreements = []
        found = [report.clusters for report in train_for_real(config).reports]
        for clusters in found[warmup_rounds:]:
            assert clusters.keys() == set(range(clients))
            agreements.append(adjusted_rand_score(truth, [clusters[k] for k in range(clients)]))
        assert agreements[0] < 0.5
        # A slower start than the first free choice is allowed; later no client changes its mind.
        assert found[warmup_rounds + 2] == found[-1]
        recovered += agreements[2:] == [1.0, 1.0, 1.0]
    assert recovered >= least
