# SPDX-License-Identifier: Apache-2.0
"""What rounds do with good and bad replies: failed rounds, gates, order, local evaluation."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.app import Error as FlowerError

from fedfusion_flwr import protocol
from fedfusion_flwr.federation.conversation import RunStopped
from fedfusion_flwr.federation.options import Plausibility
from fedfusion_flwr.federation.replies import ReplyJudge
from tests.support import (
    WEIGHT,
    FakeClient,
    Recorder,
    TamperingGrid,
    assert_identical,
    edit_value,
    honest_state,
    initial_arrays,
    make_strategy,
    replace_metric,
    replace_value,
    run_federation,
    tiny_model,
)

STRATEGIES = ("fedavg", "fedfusion")
NAN = replace_value(WEIGHT, np.full((2, 2), math.nan), "float32")
EVERYBODY = (0, 1, 2)


def test_failed_rounds_leave_no_trace_in_the_model() -> None:
    settings: dict[str, Any] = {"server_momentum": 0.5, "average_decay": 0.8}
    client = FakeClient(NAN, EVERYBODY, spoil_rounds=(2, 3))
    with_failures = run_federation("fedavg", client, 3, rounds=4, **settings)
    without = run_federation("fedavg", FakeClient(), 3, rounds=2, **settings)
    assert_identical(with_failures.state, without.state)


@pytest.mark.parametrize(("minimum", "fails"), [(2, False), (3, True)])
def test_min_valid_replies(minimum: int, fails: bool) -> None:
    client = FakeClient(NAN, (2,), spoil_rounds=(1,))
    outcome = run_federation("fedavg", client, 3, min_valid_replies=minimum)
    assert ("round-failed" in outcome.train_metrics(1)) is fails
    assert outcome.train_metrics(1)["replies-valid"] == 2
    after = outcome.reports[1].model
    moved = not torch.equal(after[WEIGHT], tiny_model().state_dict()[WEIGHT])
    assert moved is not fails


@pytest.mark.parametrize("name", STRATEGIES)
def test_output_gate_refuses_a_leap(name: str) -> None:
    leap = edit_value(WEIGHT, lambda array: array + np.float32(1000))
    client = FakeClient(leap, EVERYBODY, spoil_rounds=(1,))
    outcome = run_federation(name, client, 3, max_update_ratio=10.0)
    assert outcome.train_metrics(1)["round-failed"] == 1
    assert_identical(outcome.reports[1].model, tiny_model().state_dict())
    assert "round-failed" not in outcome.train_metrics(2)


def test_run_without_one_good_round_is_a_failure() -> None:
    with pytest.raises(RunStopped, match="none of 2 rounds"):
        run_federation("fedavg", FakeClient(NAN, EVERYBODY), 3, rounds=2, max_failed_rounds=5)


def test_run_stops_when_all_nodes_have_left() -> None:
    grid = TamperingGrid(FakeClient(), 3)

    def leave(server_round: int, arrays: ArrayRecord) -> None:
        if server_round == 1:
            grid.nodes.clear()

    with pytest.raises(RunStopped, match="0 valid replies"):
        run_federation("fedavg", None, 3, rounds=6, grid=grid, evaluate_fn=leave)  # type: ignore[arg-type]


def test_last_failed_round_reaches_the_callbacks_with_all_its_clients() -> None:
    recorder = Recorder()
    strategy = make_strategy("fedavg", recorder, min_valid_replies=3, max_failed_rounds=1)
    with pytest.raises(RunStopped):
        strategy.start(TamperingGrid(FakeClient(NAN, (2,)), 3), initial_arrays(), 4)
    last = recorder.reports[-1]
    assert last.server_round == 1
    assert [(row.client, row.weight, row.dropped) for row in last.clients] == [
        (0, 0.0, None),
        (1, 0.0, None),
        (2, 0.0, "nonfinite"),
    ]


def test_a_clients_metric_never_replaces_the_rounds_own() -> None:
    def boast(reply: Message) -> None:
        reply.content.metric_records["metrics"]["replies-dropped"] = 42

    outcome = run_federation("fedavg", FakeClient(boast, EVERYBODY), 3)
    assert outcome.train_metrics(1)["replies-dropped"] == 0


def test_recorded_weights_are_the_final_ones() -> None:
    outcome = run_federation("fedfusion", FakeClient(), 3, max_client_weight=0.4)
    report = outcome.reports[-1]
    assert report.fusion is not None
    weights = [row.weight for row in report.clients]
    assert max(weights) == pytest.approx(0.4)
    assert report.fusion.weights.tolist() == pytest.approx(weights)


@pytest.mark.parametrize("name", STRATEGIES)
def test_one_client_is_the_model(name: str) -> None:
    outcome = run_federation(name, FakeClient(), 1, rounds=1)
    assert [row.weight for row in outcome.reports[1].clients] == [1.0]
    assert_identical(outcome.state, honest_state(tiny_model().state_dict(), 0))


def test_report_lists_every_client() -> None:
    outcome = run_federation("fedfusion", FakeClient(NAN, (1,)), 3)
    rows = {row.client: row for row in outcome.reports[1].clients}
    assert sorted(rows) == [0, 1, 2]
    assert rows[1].dropped == "nonfinite"
    assert WEIGHT in str(rows[1].detail)
    assert rows[0].partition == 0
    assert rows[2].num_examples == 30
    assert rows[2].metrics["train-loss"] == 3.0
    assert sum(row.weight for row in rows.values()) == pytest.approx(1)
    assert sum(rows[0].assignment or []) == pytest.approx(1, abs=1e-5)


def spoil_evaluation(key: str, value: object) -> Any:
    spoil = replace_metric(key, value)

    def only_evaluation(reply: Message) -> None:
        if reply.metadata.message_type == "evaluate":
            spoil(reply)

    return only_evaluation


@pytest.mark.parametrize(
    ("key", "value"),
    [("personalized-accuracy", math.nan), ("num-examples", 0), ("num-examples", math.inf)],
)
@pytest.mark.parametrize("name", STRATEGIES)
def test_bad_evaluation_is_left_out_and_counted(name: str, key: str, value: float) -> None:
    client = FakeClient(spoil_evaluation(key, value), hostile=(2,))
    outcome = run_federation(name, client, 3, rounds=1, fraction_evaluate=1.0)
    # partitions 0 and 1 report 0.0 on one example and 0.1 on two
    assert outcome.result.evaluate_metrics_clientapp[1]["personalized-accuracy"] == pytest.approx(
        0.2 / 3
    )
    assert outcome.reports[1].metrics["evaluate-replies-dropped"] == 1
    assert outcome.reports[1].metrics["replies-valid"] == 3


def test_evaluation_with_no_good_reply_has_no_result() -> None:
    client = FakeClient(spoil_evaluation("personalized-accuracy", math.nan), hostile=EVERYBODY)
    outcome = run_federation("fedavg", client, 3, fraction_evaluate=1.0)
    assert not outcome.result.evaluate_metrics_clientapp
    assert outcome.reports[2].metrics["evaluate-replies-dropped"] == 3


def judged(
    content: RecordDict | None, node: int = 11, channels: int | None = 2, **settings: Any
) -> Any:
    sent = tiny_model().state_dict()
    judge = ReplyJudge(4, {11: 0, 12: 1}, lambda *_: sent, num_channels=channels, **settings)
    TamperingGrid(FakeClient(), 0)  # names this process as a message's sender
    request = Message(RecordDict(), node, "train")
    request.metadata.__dict__["_message_id"] = "m"
    reply = Message(content or FlowerError(1, "first line\nsecond"), reply_to=request)
    reply.metadata.__dict__["_src_node_id"] = node
    good, bad = judge.judge([reply])
    return good, {row.node: row for row in bad}


def good_content(**metrics: Any) -> RecordDict:
    state = honest_state(tiny_model().state_dict(), 0)
    content = RecordDict({"arrays": protocol.record_from_state(state)})
    content["metrics"] = MetricRecord({"num-examples": 5, "loss": 0.5, **metrics})
    return content


def test_good_reply() -> None:
    content = good_content(losses=[1.0, 2.0])
    two = {key: torch.tensor([1.0, 2.0]) for key in protocol.STATISTICS_KEYS}
    content["normalization"] = protocol.record_from_state(two)
    content["client"] = ConfigRecord({"server-round": 4, "partition-id": 8})
    (reply,), bad = judged(content)
    assert (reply.client, reply.node, reply.partition, reply.num_examples) == (0, 11, 8, 5)
    assert reply.metrics == {"loss": 0.5}
    assert reply.lists == {"losses": [1.0, 2.0]}
    assert reply.statistics.std.tolist() == [1.0, 2.0]
    assert_identical(reply.state, honest_state(tiny_model().state_dict(), 0))
    assert bad[12].dropped == "missing"
    assert bad[12].client == 1


def test_a_clients_text_is_logged_as_one_printable_line() -> None:
    _, bad = judged(None)
    assert (bad[11].dropped, bad[11].detail) == ("error", "first line")
    _, bad = judged(good_content(**{"\x1b[2Jmore": math.nan}))
    assert "[2Jmore" in bad[11].detail
    assert bad[11].detail.isprintable()


def test_normalization_of_more_channels_than_the_model_has_values() -> None:
    """Where the model does not show their number, as with GroupNorm."""
    content = good_content()
    many = {key: torch.ones(5000) for key in protocol.STATISTICS_KEYS}
    content["normalization"] = protocol.record_from_state(many)
    _, bad = judged(content, channels=None)
    assert bad[11].dropped == "size"


def test_stranger_has_no_client_id() -> None:
    good, bad = judged(good_content(), node=99)
    assert not good
    assert (bad[99].client, bad[99].dropped) == (None, "stranger")
    assert {bad[11].dropped, bad[12].dropped} == {"missing"}


@pytest.mark.parametrize("count", [5, 5.0])
def test_whole_example_counts(count: float) -> None:
    good, _ = judged(good_content(**{"num-examples": count}))
    assert good[0].num_examples == 5
    assert type(good[0].num_examples) is int


def test_limit_of_examples_and_their_key() -> None:
    assert judged(good_content(), plausibility=Plausibility(max_examples=5))[0]
    few = Plausibility(max_examples=4)
    assert judged(good_content(), plausibility=few)[1][11].dropped == "examples"
    assert judged(good_content(weight=2), examples_key="weight")[0][0].num_examples == 2


def test_only_model_under_another_name_is_taken() -> None:
    content = good_content()
    content["model"] = content.array_records["arrays"]
    del content["arrays"]
    assert judged(content)[0]
