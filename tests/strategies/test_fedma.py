# SPDX-License-Identifier: Apache-2.0
"""FedMA's passes: what is sent, what becomes of the replies, and of clients that fail.

The tiny model has two layers, so that a pass is two rounds.
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import ConfigRecord, Context, Message

from fedfusion_flwr import RunConfig, protocol
from fedfusion_flwr.errors import FedFusionError
from fedfusion_flwr.models.plain_network import plain_network
from fedfusion_flwr.randomness import torch_generator
from fedfusion_flwr.simulation import InProcessGrid
from fedfusion_flwr.strategies import FedMA, RunStopped, build_strategy
from tests.strategies.test_hostile_replies import SPOILED
from tests.support import (
    COUNTER,
    WEIGHT,
    FakeClient,
    Outcome,
    Recorder,
    State,
    TamperingGrid,
    assert_identical,
    edit_value,
    honest_state,
    initial_arrays,
    replace_metric,
    tiny_model,
)

HONEST = 5
NETWORK = plain_network(tiny_model(), "tiny", (2,))
OUT = "out.weight"


def other_state(number: int) -> State:
    """An untrained tiny model of a number; its units lie far apart."""
    generator = torch_generator(0, "test", number)
    model = tiny_model()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(5 * torch.randn(parameter.shape, generator=generator))
    return model.state_dict()


def run_fedma(
    client: Callable[[Message, Context], Message],
    num_clients: int,
    *,
    rounds: int = 2,
    grid: InProcessGrid | None = None,
    **settings: Any,
) -> Outcome:
    recorder = Recorder()
    arguments = {"min_train_nodes": 1, "min_available_nodes": 1, "fraction_evaluate": 0} | settings
    strategy = FedMA(network=NETWORK, callbacks=[recorder], **arguments)
    grid = grid or TamperingGrid(client, num_clients)
    result = strategy.start(grid, initial_arrays(), num_rounds=rounds)
    return Outcome(result, strategy, recorder.reports)


def trained(received: State, partition: int, times: int = 1) -> State:
    for _ in range(times):
        received = honest_state(received, partition)
    return received


# --- a pass ---------------------------------------------------------------------------------------


@dataclass
class Listener(FakeClient):
    """Keeps what each train message said, by round and partition, and every message's type."""

    settings: dict[tuple[int, int], ConfigRecord] = field(default_factory=dict)
    received: dict[tuple[int, int], State] = field(default_factory=dict)
    types: list[tuple[str, int]] = field(default_factory=list)

    def __call__(self, message: Message, context: Context) -> Message:
        config = message.content.config_records["config"]
        where = int(config["server-round"]), int(context.node_config["partition-id"])  # type: ignore[arg-type]
        self.types.append((message.metadata.message_type, where[0]))
        if message.metadata.message_type == "train":
            self.settings[where] = config
            arrays = message.content.array_records["arrays"]
            self.received[where] = protocol.state_from_record(arrays)
        return super().__call__(message, context)


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
    for partition in range(3):
        assert "frozen" not in client.settings[1, partition]
        assert "class-counts" not in client.settings[1, partition]
        last = client.settings[2, partition]
        assert last["class-counts"] is True
        frozen = [key for key in start if not key.startswith("out.")]
        assert sorted(last["frozen"]) == sorted(frozen)  # type: ignore[type-var]
        # Everybody gets the matched layer, and the own one above it.
        received = client.received[2, partition]
        assert_identical(
            {key: received[key] for key in frozen}, {key: outcome.state[key] for key in frozen}
        )
        assert_identical({OUT: received[OUT]}, {OUT: trained(start, partition)[OUT]})


def test_the_model_changes_at_the_end_of_a_pass_only() -> None:
    outcome = run_fedma(FakeClient(), 3, rounds=5)
    models = [report.model for report in outcome.reports]
    assert_identical(models[1], models[0])
    assert_identical(models[3], models[2])
    assert_identical(models[5], models[4])
    assert not torch.equal(models[2][WEIGHT], models[1][WEIGHT])
    assert not torch.equal(models[4][WEIGHT], models[2][WEIGHT])
    assert_identical(outcome.state, models[4])
    metrics = [outcome.train_metrics(r) for r in range(1, 6)]
    assert [(m["pass"], m["layer"]) for m in metrics] == [(1, 1), (1, 2), (2, 1), (2, 2), (3, 1)]


@pytest.mark.parametrize(("every", "rounds"), [(1, [2, 4, 5]), (2, [4, 5])])
def test_clients_evaluate_at_the_end_of_passes(every: int, rounds: list[int]) -> None:
    client = Listener()
    run_fedma(client, 2, rounds=5, fraction_evaluate=1.0, evaluate_every=every)
    assert sorted({r for kind, r in client.types if kind == "evaluate"}) == rounds


def test_every_client_starts_from_a_network_of_its_own() -> None:
    client = Listener()
    outcome = run_fedma(client, 3, rounds=3, initial_state=other_state, matching_gamma=1e30)
    for partition in range(3):
        assert_identical(client.received[1, partition], other_state(partition + 1))
    # No unit is like another: none is shared, and layer 2 has 6 inputs.
    assert outcome.train_metrics(1)["layer-width"] == 6
    assert {k: tuple(v.shape) for k, v in outcome.state.items()} == {
        "fc.weight": (6, 2),
        **{f"norm.{name}": (6,) for name in ("weight", "bias", "running_mean", "running_var")},
        COUNTER: (),
        "out.weight": (2, 6),
        "out.bias": (2,),
    }
    # In the second layer's round a client's inputs are where its units went; the others are zero.
    wide = client.received[2, 1]
    own = trained(other_state(2), 1)
    columns = [j for j in range(6) if bool((wide[OUT][:, j] != 0).any())]
    assert len(columns) == 2
    first = [torch.where((wide[WEIGHT] == row).all(1))[0].item() for row in own[WEIGHT]]
    assert sorted(first) == columns
    assert torch.equal(wide[OUT][:, first], own[OUT])
    # The next pass begins with the client's own units of the global network, in their old order.
    again = client.received[3, 1]
    assert torch.equal(again[WEIGHT], own[WEIGHT])
    assert torch.equal(again[OUT], outcome.state[OUT][:, first])


def test_newcomers_get_the_units_of_most_members() -> None:
    """Two clients of three train in a pass; the third comes with the second pass."""
    client = Listener()
    grid = TamperingGrid(client, 3)
    outcome = run_fedma(client, 3, rounds=6, grid=grid, fraction_train=0.67, seed=1)
    strategy = outcome.strategy
    assert isinstance(strategy, FedMA)
    cohorts = [{p for r, p in client.received if r == number} for number in range(1, 7)]
    assert all(len(cohort) == 2 for cohort in cohorts)
    assert cohorts[0] == cohorts[1]
    assert cohorts[2] == cohorts[3]
    assert len({frozenset(cohort) for cohort in cohorts}) > 1
    shapes = {key: value.shape for key, value in tiny_model().state_dict().items()}
    for number in (3, 5):
        for partition in cohorts[number - 1]:
            received = client.received[number, partition]
            assert {key: value.shape for key, value in received.items()} == shapes


def test_common_units_are_those_of_most_members() -> None:
    """Clients 0 and 1 share two units, client 2 has two of its own: newcomers get the shared."""

    def start(number: int) -> State:
        state = tiny_model().state_dict()
        signs = 50 * torch.eye(2) * (-1 if number == 1 else 1)
        return {**state, WEIGHT: signs, **{f"norm.{k}": torch.zeros(2) for k in ("bias", "weight")}}

    def with_scale(number: int) -> State:
        return {**start(number), "norm.weight": torch.ones(2)}

    outcome = run_fedma(FakeClient(), 3, initial_state=with_scale)
    strategy = outcome.strategy
    assert isinstance(strategy, FedMA)
    assert outcome.train_metrics(1)["layer-width"] == 4
    members = np.bincount(np.concatenate([units[0] for units in strategy.units_of.values()]))
    assert sorted(members.tolist()) == [1, 1, 2, 2]
    assert members[strategy.common_units[0]].tolist() == [2, 2]


# --- clients that fail ----------------------------------------------------------------------------


@functools.cache
def honest_run() -> Outcome:
    return run_fedma(FakeClient(), HONEST)


@pytest.mark.parametrize("row", SPOILED)
def test_hostile_client_is_left_out_of_the_pass(row: str) -> None:
    spoil, reason = SPOILED[row]
    outcome = run_fedma(FakeClient(spoil, hostile=(HONEST,)), HONEST + 1)
    first, second = outcome.train_metrics(1), outcome.train_metrics(2)
    assert first[f"dropped-{reason}"] == first["replies-dropped"] == 1
    assert second["replies-dropped"] == 0
    assert first["replies-valid"] == second["replies-valid"] == HONEST
    assert_identical(outcome.state, honest_run().state)


CLASS_COUNTS: dict[str, Any] = {
    "missing": None,
    "too few": [60],
    "too many": [30, 20, 10],
    "negative": [70, -10],
    "another sum": [60, 1],
    "halves": [59.5, 0.5],
    "one number": 60,
    "NaN": [60.0, math.nan],
}


@pytest.mark.parametrize("row", CLASS_COUNTS)
def test_false_class_counts_cost_the_reply(row: str) -> None:
    def spoil(reply: Message) -> None:
        if CLASS_COUNTS[row] is None:
            del reply.content.metric_records["metrics"]["class-counts"]
        else:
            replace_metric("class-counts", CLASS_COUNTS[row])(reply)

    client = FakeClient(spoil, hostile=(HONEST,), spoil_rounds=(2,))
    outcome = run_fedma(client, HONEST + 1)
    reason = "nonfinite" if row == "NaN" else "class-counts"
    assert outcome.train_metrics(2)[f"dropped-{reason}"] == 1
    (dropped,) = outcome.reports[2].dropped
    if reason == "class-counts":
        assert dropped.detail is not None
        assert "2 whole numbers that sum to num-examples = 60" in dropped.detail
    # Layer 1 has all six clients' mean, layer 2 is that of five.
    assert not torch.equal(outcome.state[WEIGHT], honest_run().state[WEIGHT])
    assert [row.client for row in outcome.reports[2].clients if row.weight] == list(range(HONEST))


def test_a_class_that_nobody_has_is_the_plain_mean() -> None:
    def one_class(reply: Message) -> None:
        metrics = reply.content.metric_records["metrics"]
        if "class-counts" in metrics:
            metrics["class-counts"] = [metrics["num-examples"], 0]  # type: ignore[assignment]

    client = FakeClient(one_class, hostile=(0, 1, 2))
    outcome = run_fedma(client, 3, matching_width="fixed")
    start = tiny_model().state_dict()
    moved = torch.tensor([2 * (1 + 4 + 9) / 600, 0.04])  # sum n d / sum n, and mean d; d twice
    torch.testing.assert_close(outcome.state[OUT], start[OUT] + moved[:, None])


def test_matched_layers_are_not_the_clients_to_change() -> None:
    """Replies of the second round with other lower layers make no difference."""
    spoil = edit_value(WEIGHT, lambda array: -array)
    client = FakeClient(spoil, hostile=tuple(range(HONEST)), spoil_rounds=(2,))
    assert_identical(run_fedma(client, HONEST).state, honest_run().state)


def drop_all(reply: Message) -> None:
    del reply.content["arrays"]


def test_a_round_that_fails_is_repeated() -> None:
    everybody = tuple(range(HONEST))
    client = FakeClient(drop_all, hostile=everybody, spoil_rounds=(2,))
    outcome = run_fedma(client, HONEST, rounds=3)
    assert outcome.train_metrics(2)["round-failed"] == 1
    assert [outcome.train_metrics(r)["layer"] for r in (1, 3)] == [1, 2]
    assert_identical(outcome.state, honest_run().state)


def test_replies_that_would_overflow_keep_the_old_model() -> None:
    huge = edit_value(OUT, lambda array: np.full_like(array, 3e38))
    client = FakeClient(huge, hostile=(0, 1), spoil_rounds=(2,))
    outcome = run_fedma(client, 2, rounds=3, max_update_ratio=math.inf)
    assert outcome.state[OUT].isfinite().all()


@pytest.mark.parametrize(("lost", "min_valid"), [((0,), 1), ((0, 1, 2), 1), ((0,), 3)])
def test_clients_that_vanish_on_the_way(lost: tuple[int, ...], min_valid: int) -> None:
    """The pass goes on without them; with too few left, a new one begins with those there are."""

    class Vanishing(Listener):
        def __call__(self, message: Message, context: Context) -> Message:
            reply = super().__call__(message, context)
            if len(self.received) == 3 and grid.nodes.keys() == set(nodes):
                for partition in lost:
                    grid.remove_node(nodes[partition])
                for partition in range(3, 6):
                    grid.add_node({"partition-id": partition, "num-partitions": 6})
            return reply

    client = Vanishing()
    grid = TamperingGrid(client, 3)
    nodes = list(grid.nodes)
    settings = {"min_valid_replies": min_valid, "matching_width": "fixed"}
    outcome = run_fedma(client, 3, rounds=3, grid=grid, **settings)
    asked = [{p for r, p in client.received if r == number} for number in (1, 2)]
    assert asked[0] == {0, 1, 2}
    if len(lost) == 1 and min_valid == 1:
        assert asked[1] == {1, 2}
        assert outcome.train_metrics(2)["layer"] == 2
        assert [row.weight for row in outcome.reports[2].clients] == [0.5, 0.5]
    else:
        assert asked[1] == set(range(6)) - set(lost)
        assert outcome.train_metrics(2)["layer"] == 1
        assert outcome.train_metrics(3)["layer"] == 2


def test_passes_that_never_succeed_end_the_run() -> None:
    client = FakeClient(drop_all, hostile=(0, 1), spoil_rounds=(2, 3, 4))
    with pytest.raises(RunStopped, match="3 failed rounds in a row"):
        run_fedma(client, 2, rounds=6)


# --- what a user can mend -------------------------------------------------------------------------


def test_a_run_without_a_whole_pass_is_refused() -> None:
    with pytest.raises(FedFusionError, match=r"num-server-rounds = 1 .* the model's 2 layers"):
        run_fedma(FakeClient(), 2, rounds=1)


def test_rounds_that_are_left_over_are_told(caplog: pytest.LogCaptureFixture) -> None:
    logging.getLogger("flwr").addHandler(caplog.handler)
    try:
        with caplog.at_level(logging.INFO, logger="flwr"):
            run_fedma(FakeClient(), 2, rounds=5, matching_width="fixed")
            log = caplog.text
            caplog.clear()
            run_fedma(FakeClient(), 2, rounds=4)
    finally:
        logging.getLogger("flwr").removeHandler(caplog.handler)
    assert "the last 1 of 5 rounds are part of no whole pass" in log
    assert "fixed width: a deviation from the paper" in log
    assert "no whole pass" not in caplog.text
    assert "variable width, gamma 0.001" in caplog.text


def test_settings_that_do_not_fit_are_refused() -> None:
    with pytest.raises(FedFusionError, match="give it network"):
        FedMA()
    with pytest.raises(FedFusionError, match=r"average_decay = 0.5 must be 0"):
        FedMA(network=NETWORK, average_decay=0.5)


def test_registry_builds_it() -> None:
    config = RunConfig(strategy="fedma", matching_width="fixed", matching_gamma=2.0)
    strategy = build_strategy(config, initial_state=other_state, network=NETWORK)
    assert isinstance(strategy, FedMA)
    assert strategy.network is NETWORK
    assert strategy.initial_state is other_state
    chosen = strategy.matching_width, strategy.matching_gamma, strategy.matching_sweeps
    assert chosen == ("fixed", 2.0, 5)
