# SPDX-License-Identifier: Apache-2.0
"""Clients that join late, vanish or fail, alone or as a whole cluster, or are very many."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from flwr.app import Context, Message

from fedfusion_flwr.federation.conversation import RunStopped
from fedfusion_flwr.federation.in_process_grid import InProcessGrid
from fedfusion_flwr.federation.strategy import MODELS_IN_FLIGHT
from tests.strategies.planted import QUIET, PlantedClients, flat, run_planted, start_state
from tests.support import (
    COUNTER,
    TINY,
    After,
    FakeClient,
    Outcome,
    Recorder,
    TamperingGrid,
    assert_identical,
    initial_arrays,
    make_strategy,
    replace_metric,
    run_federation,
)

STRATEGIES = ("fedfusion", *TINY)
MANY = 2 * MODELS_IN_FLIGHT + 3
BAD = replace_metric("num-examples", -1)
SEVERAL_MODELS = ("fesem", "ifca", "fedcluster", "fedgroup")


def trained_in(outcome: Outcome) -> list[list[int | None]]:
    return [[row.client for row in r.clients if not row.dropped] for r in outcome.reports[1:]]


@pytest.mark.parametrize("name", STRATEGIES)
def test_clients_that_join_late_and_leave_early(name: str) -> None:
    """Client 4 joins after round 1; client 0 leaves after round 2. Nobody waits for them."""
    grid = TamperingGrid(FakeClient(), 4)
    first = next(iter(grid.nodes))
    late = {"partition-id": 4, "num-partitions": 5}
    recorder = Recorder()
    strategy = make_strategy(name, recorder, fraction_evaluate=1.0)
    strategy.callbacks.append(
        After({1: lambda: grid.add_node(late), 2: lambda: grid.remove_node(first)})
    )
    outcome = Outcome(strategy.start(grid, initial_arrays(), 4), strategy, recorder.reports)
    expected = [[0, 1, 2, 3], [0, 1, 2, 3, 4], [1, 2, 3, 4], [1, 2, 3, 4]]
    assert trained_in(outcome) == expected
    assert not any(report.dropped for report in outcome.reports)
    valid = [r.metrics["evaluate-replies-valid"] for r in outcome.reports[1:]]
    assert valid == [4, 5, 4, 4]
    if hasattr(getattr(outcome.strategy.state, "clusters", None), "of"):
        assert outcome.strategy.state.clusters.of.keys() == set(range(5))
    if name == "fedfusion":
        fusion = outcome.reports[4].fusion
        assert fusion is not None
        assert fusion.clients == [0, 1, 2, 3, 4]
        assert fusion.weights[0] == 0


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_client_that_is_lost_during_a_round_is_missing_there(name: str) -> None:
    """Client 3's node answers no message of round 2."""

    def lose(replies: list[Message]) -> list[Message]:
        echoes = [reply.content.config_records["client"] for reply in replies]
        return [
            reply
            for reply, echo in zip(replies, echoes, strict=True)
            if (echo["server-round"], echo["partition-id"]) != (2, 3)
        ]

    outcome = run_federation(name, FakeClient(), 4, rounds=3, tamper=lose)
    assert {row.dropped for row in outcome.reports[2].dropped} == {"missing"}
    trained = trained_in(outcome)
    assert trained[1] == [0, 1, 2]
    assert trained[0] == trained[2] == [0, 1, 2, 3]


@pytest.mark.parametrize("name", STRATEGIES)
def test_cohorts_of_a_fraction_are_seeded(name: str) -> None:
    def cohorts(seed: int, grid_seed: int) -> tuple[list[list[int | None]], Outcome]:
        grid = TamperingGrid(FakeClient(), 8, seed=grid_seed, shuffle_replies=True)
        outcome = run_federation(
            name, FakeClient(), 8, rounds=4, grid=grid, seed=seed, fraction_train=0.5
        )
        return trained_in(outcome), outcome

    (one, first), (again, second), (other, _) = cohorts(0, 0), cohorts(0, 1), cohorts(3, 0)
    assert one == again != other
    assert_identical(first.state, second.state)
    assert first.train_metrics(4) == second.train_metrics(4)
    # FedCluster rounds the size of the cohort down in each of its clusters.
    assert all(len(cohort) == 4 or name == "fedcluster" for cohort in one)


@pytest.mark.parametrize("name", STRATEGIES)
def test_bad_replies_for_three_rounds_stop_the_run(name: str) -> None:
    hostile = FakeClient(BAD, hostile=tuple(range(4)), spoil_rounds=(3, 4, 5))
    recorder = Recorder()
    strategy = make_strategy(name, recorder)
    stopped = r"stopped after 3 failed rounds in a row.*0 valid replies"
    with pytest.raises(RunStopped, match=stopped):
        strategy.start(TamperingGrid(hostile, 4), initial_arrays(), 9)
    assert [report.server_round for report in recorder.reports] == [0, 1, 2, 3, 4, 5]
    assert {server_round for _, server_round, _ in hostile.seen} == {1, 2, 3, 4, 5}
    for report in recorder.reports[3:]:
        assert report.metrics["round-failed"] == 1
        assert report.metrics["dropped-examples"] == 4
    # The run ends with the models of the last good round.
    good = run_federation(name, FakeClient(), 4, rounds=2)
    for model in (strategy.progress.average.state, *(r.model for r in recorder.reports[3:5])):
        assert_identical(model, good.state)
    models = good.strategy.models()
    for key, model in strategy.models().items():
        assert_identical(model, models[key])


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_run_goes_on_after_failed_rounds(name: str) -> None:
    hostile = FakeClient(BAD, hostile=tuple(range(4)), spoil_rounds=(1, 2, 4, 5))
    outcome = run_federation(name, hostile, 4, rounds=6, max_failed_rounds=3)
    failed = [r.server_round for r in outcome.reports if "round-failed" in r.metrics]
    assert failed == [1, 2, 4, 5]
    for server_round in failed:
        before, after = outcome.reports[server_round - 1 : server_round + 1]
        assert_identical(after.model, before.model)
    assert outcome.strategy.progress.failed_rounds == 0
    if name in ("fedavg", "fedfusion"):
        assert outcome.state[COUNTER].item() == 2
    assert trained_in(outcome)[5] == [0, 1, 2, 3]


class Pair(PlantedClients):
    """Two planted groups, which choose the model of their number (IFCA)."""

    def __init__(self, group_of: Callable[[int], int], silent: tuple[int, ...] = ()) -> None:
        super().__init__(group_of)
        self.silent = silent

    def choose(self, models: list[Any], client: int) -> int:
        return self.group_of(client)

    def __call__(self, message: Message, context: Context) -> Message:
        server_round = message.content.config_records["config"]["server-round"]
        if server_round == 4 and context.node_config["partition-id"] in self.silent:
            raise OSError("broken")
        return super().__call__(message, context)


def several(name: str) -> Any:
    strategy, tiny = TINY[name]
    own = {"centre_update": "round"} if name == "fesem" else {"warmup_rounds": 0}
    settings = {**tiny, **(own if name in ("fesem", "ifca") else {}), **QUIET}
    if "initial_state" in strategy.__dataclass_fields__:
        settings["initial_state"] = start_state
    return strategy(**settings)


@pytest.mark.parametrize("name", SEVERAL_MODELS)
def test_a_cluster_whose_clients_all_vanish_keeps_its_model(name: str) -> None:
    """FeSEM's centres of this round's clients only; with all, the stored models remain."""
    grid = TamperingGrid(Pair(lambda client: client % 2), 6)
    strategy = several(name)
    kept: dict[str, Any] = {}

    def vanish() -> None:
        kept.update(strategy.models()[f"c{strategy.state.clusters.of[1]}"])
        for node, context in list(grid.contexts.items()):
            if context.node_config["partition-id"] in (1, 3, 5):
                grid.remove_node(node)

    strategy.callbacks.append(After({3: vanish}))
    outcome = run_planted(strategy, None, 6, rounds=5, grid=grid)
    gone = strategy.state.clusters.of[1]
    assert {c for c, cluster in strategy.state.clusters.of.items() if cluster == gone} == {1, 3, 5}
    assert_identical(strategy.models()[f"c{gone}"], kept)
    for report in outcome.reports[4:]:
        assert "round-failed" not in report.metrics
        assert [row.client for row in report.clients] == [0, 2, 4]
        assert report.metrics["clusters-updated"] == 1
    # If they returned, they would be served it; IFCA's clients would choose again.
    if name != "ifca":
        assert_identical(strategy.personal_model(1), kept)


@pytest.mark.parametrize("name", SEVERAL_MODELS)
def test_a_cluster_whose_only_reply_is_bad_keeps_its_model(name: str) -> None:
    """Client 2 is alone in its cluster, and fails in round 4."""
    alone = Pair(lambda client: int(client == 2))
    before = several(name)
    run_planted(before, alone, 3, rounds=3)
    strategy = several(name)
    failing = Pair(lambda client: int(client == 2), silent=(2,))
    outcome = run_planted(strategy, failing, 3, rounds=4)
    lonely, others = (f"c{strategy.state.clusters.of[client]}" for client in (2, 0))
    assert lonely != others
    assert_identical(strategy.models()[lonely], before.models()[lonely])
    assert not torch.equal(flat(strategy.models()[others]), flat(before.models()[others]))
    assert outcome.reports[4].metrics["clusters-updated"] == 1
    assert "round-failed" not in outcome.reports[4].metrics


def test_an_implausible_cluster_is_held_back_alone() -> None:
    """One cluster's fused model leaps; the other's is taken, and the round does not fail."""
    strategy = make_strategy("ifca", recorder := Recorder(), warmup_rounds=0)
    fuse = strategy.fuse_replies

    def far(replies: list[Any]) -> Any:
        fused = fuse(replies)
        odd = replies[0].client % 2
        return {k: v * 1000 if odd and k == "fc.weight" else v for k, v in fused.items()}

    strategy.fuse_replies = far  # type: ignore[method-assign]
    strategy.start(TamperingGrid(FakeClient(), 4), initial_arrays(), 1)
    assert recorder.reports[1].metrics["clusters-updated"] == 1
    assert "round-failed" not in recorder.reports[1].metrics
    weights = {row.client: row.weight for row in recorder.reports[1].clients}
    assert weights[1] == weights[3] == 0
    assert weights[0] + weights[2] == pytest.approx(1)


class CountingGrid(InProcessGrid):
    """Notes of every exchange its kind, its messages and its different models."""

    def __init__(self) -> None:
        super().__init__(FakeClient(), MANY)
        self.exchanges: list[tuple[str, int, int]] = []

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        messages = list(messages)
        models = {id(message.content["arrays"]) for message in messages}
        kind = messages[0].metadata.message_type
        self.exchanges.append((kind, len(messages), len(models)))
        return super().send_and_receive(messages, timeout=timeout)


@pytest.mark.parametrize(
    ("name", "evaluations"),
    [
        ("fedavg", [(MANY, 1)]),
        ("ifca", [(MANY, 1)]),
        ("fesem", [(MANY, 2)]),
        ("fedbn", [(MODELS_IN_FLIGHT, MODELS_IN_FLIGHT)] * 2 + [(3, 3)]),
    ],
)
def test_few_models_are_out_at_a_time(name: str, evaluations: list[tuple[int, int]]) -> None:
    """Clients with models of their own are evaluated in parts; equal models are encoded once."""
    grid = CountingGrid()
    outcome = run_federation(name, FakeClient(), MANY, rounds=1, grid=grid, fraction_evaluate=1)
    seen = [(messages, models) for kind, messages, models in grid.exchanges if kind == "evaluate"]
    assert seen == evaluations
    assert outcome.reports[1].metrics["evaluate-replies-valid"] == MANY
