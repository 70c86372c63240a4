# SPDX-License-Identifier: Apache-2.0
"""One hostile client among honest ones: it loses its reply, and the run is that of the others.

Three strategies, one of each kind, go through the whole table; the others through fifteen rows. The
client is hostile in every message, also in cold starts, warm starts and clusterings.
"""

from __future__ import annotations

import functools
import math

import pytest
from flwr.app import Error, Message
from flwr.app.message.message import make_message
from flwr.common.constant import SUPERLINK_NODE_ID, ErrorCode

from tests.federation.hostile_rows import SPOILED, one
from tests.support import (
    COUNTER,
    TINY,
    FakeClient,
    Outcome,
    Tamper,
    assert_identical,
    run_federation,
)

HONEST = 5
STRATEGIES = ("fedfusion", *TINY)
WHOLE_TABLE = ("fedavg", "fedfusion", "fedgroup")
"""These go through all rows; the others, which share their checks, through `TYPICAL` rows."""
TYPICAL = (
    "one NaN",
    "NaN running mean",
    "examples 10**18",
    "examples missing",
    "shape (2,) into (2, 2)",
    "float counter",
    "key missing",
    "no model",
    "NaN metric",
    "oversize array",
    "negative variance",
    "counter backwards",
    "normalization NaN",
    "round of before",
    "client raises",
)
ASKED = {"fesem": (2, 1), "fedgroup": (3, 2)}
"""How often the hostile client is asked in rounds 1 and 2, where a strategy trains it before the
round's own training: FeSEM's warm start, FedGroup's cold start and newcomers. FedCluster asks it
in round 2 for its clustering, and without a cluster it has no part in the training."""


@functools.cache
def honest_run(name: str) -> Outcome:
    return run_federation(name, FakeClient(), HONEST)


def check_hostile(outcome: Outcome, name: str, counts: dict[str, int]) -> None:
    """The drops are counted, and the hostile client leaves no other trace."""
    assert len(outcome.reports) == 3
    for server_round, asked in zip((1, 2), ASKED.get(name, (1, 1)), strict=True):
        report = outcome.reports[server_round]
        metrics = outcome.train_metrics(server_round)
        expected = {f"dropped-{reason}": float(asked * n) for reason, n in counts.items()}
        assert {k: v for k, v in metrics.items() if k.startswith("dropped-")} == expected
        assert metrics["replies-dropped"] == asked * sum(counts.values()) == len(report.dropped)
        honest = honest_run(name).train_metrics(server_round)
        assert metrics["replies-valid"] == honest["replies-valid"]
        assert metrics["train-loss"] == honest["train-loss"]
        assert "round-failed" not in metrics
        assert {row.dropped for row in report.dropped} == set(counts)
        assert all(row.detail and row.weight == 0 for row in report.dropped)
    assert all(value.isfinite().all() for value in outcome.state.values())
    assert_identical(outcome.state, honest_run(name).state)
    models, others = outcome.strategy.models(), honest_run(name).strategy.models()
    assert models.keys() == others.keys()
    for key, model in models.items():
        assert_identical(model, others[key])


@pytest.mark.parametrize(
    ("name", "row"),
    [(name, row) for name in STRATEGIES for row in (SPOILED if name in WHOLE_TABLE else TYPICAL)],
)
def test_hostile_client_loses_its_reply(name: str, row: str) -> None:
    spoil, reason = SPOILED[row]
    outcome = run_federation(name, FakeClient(spoil, hostile=(HONEST,)), HONEST + 1)
    check_hostile(outcome, name, {reason: 1})
    assert {r.client for r in outcome.reports[1].dropped} == {HONEST}


def is_last(reply: Message) -> bool:
    return reply.content.config_records["client"]["partition-id"] == HONEST


def lose_last(replies: list[Message]) -> list[Message]:
    return [reply for reply in replies if not is_last(reply)]


def repeat_first(replies: list[Message]) -> list[Message]:
    return [replies[0] if is_last(reply) else reply for reply in replies]


def from_a_stranger(replies: list[Message]) -> list[Message]:
    for reply in filter(is_last, replies):
        reply.metadata.__dict__["_src_node_id"] = 7
    return replies


def gone(replies: list[Message]) -> list[Message]:
    """Flower's own answer for a node that is offline."""
    for position, reply in enumerate(replies):
        if is_last(reply):
            error = Error(ErrorCode.NODE_UNAVAILABLE, "node is not available")
            reply = make_message(metadata=reply.metadata, error=error)
            reply.metadata.__dict__["_src_node_id"] = SUPERLINK_NODE_ID
            replies[position] = reply
    return replies


@pytest.mark.parametrize("name", ["fedavg", "fedfusion", "ifca", "fesem", "fedcluster"])
@pytest.mark.parametrize(
    ("tamper", "counts"),
    [
        (lose_last, {"missing": 1}),
        (repeat_first, {"duplicate": 1, "missing": 1}),
        (from_a_stranger, {"stranger": 1, "missing": 1}),
        (gone, {"missing": 1}),
    ],
)
def test_replies_lost_repeated_or_from_elsewhere(
    name: str, tamper: Tamper, counts: dict[str, int]
) -> None:
    outcome = run_federation(name, FakeClient(), HONEST + 1, tamper=tamper)
    check_hostile(outcome, name, counts)


@pytest.mark.parametrize("name", STRATEGIES)
def test_honest_run_really_aggregates(name: str) -> None:
    outcome = honest_run(name)
    assert [len(report.dropped) for report in outcome.reports] == [0, 0, 0]
    weights: dict[int | None, float] = {}
    for row in outcome.reports[2].clients:
        cluster = None if name == "fedfusion" else row.cluster
        weights[cluster] = weights.get(cluster, 0) + row.weight
        assert row.weight > 0
    # In every cluster; strategies with one model have none.
    assert list(weights.values()) == pytest.approx([1] * len(weights))
    assert outcome.state[COUNTER].item() == (3 if name in ("fesem", "fedgroup") else 2)


@pytest.mark.parametrize("name", STRATEGIES)
def test_client_that_knows_nothing_of_this_package(name: str) -> None:
    plain = {"echo": False, "normalization": False}
    honest = run_federation(name, FakeClient(**plain), HONEST)
    hostile = FakeClient(one(math.nan), hostile=(HONEST,), **plain)
    outcome = run_federation(name, hostile, HONEST + 1)
    assert outcome.train_metrics(1)["dropped-nonfinite"] == ASKED.get(name, (1, 1))[0]
    assert_identical(outcome.state, honest.state)
    # The statistics read from the state dict are those that our own client would have sent.
    assert_identical(honest.state, honest_run(name).state)
