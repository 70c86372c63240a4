# SPDX-License-Identifier: Apache-2.0
"""One hostile client among honest ones: it loses its reply, and the run is that of the others.

The rows are those that make Flower's own strategies return NaN, extrapolate, broadcast or stop.
Three strategies go through the whole table, one of each kind; the others through fifteen rows. The
client is hostile in every message, so also in cold starts, warm starts and clusterings.
"""

from __future__ import annotations

import functools
import math

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, Error, Message, MetricRecord
from flwr.app.message.message import make_message
from flwr.common.constant import SUPERLINK_NODE_ID, ErrorCode

from tests.support import (
    COUNTER,
    MEAN,
    TINY,
    VARIANCE,
    WEIGHT,
    FakeClient,
    Outcome,
    Spoil,
    Tamper,
    arrays_of,
    assert_identical,
    edit_value,
    npy_payload,
    replace_metric,
    replace_payload,
    replace_value,
    run_federation,
    saved,
)

HONEST = 5
STRATEGIES = ("fedfusion", *TINY)
WHOLE_TABLE = ("fedavg", "fedfusion", "fedgroup")
"""All rows; the other strategies, which share the checks of these, see `TYPICAL` rows."""
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


def one(value: float, key: str = WEIGHT, record: str = "arrays") -> Spoil:
    """Overwrite a single number."""

    def edit(array: np.ndarray) -> np.ndarray:
        array.reshape(-1)[0] = value
        return array

    return edit_value(key, edit, record)


def drop_record(name: str) -> Spoil:
    def spoil(reply: Message) -> None:
        del reply.content[name]

    return spoil


def drop_array(key: str, record: str = "arrays") -> Spoil:
    def spoil(reply: Message) -> None:
        del reply.content.array_records[record][key]

    return spoil


def drop_examples(reply: Message) -> None:
    del reply.content.metric_records["metrics"]["num-examples"]


def second_metric_record(reply: Message) -> None:
    reply.content["more"] = MetricRecord({"num-examples": 3})


def second_model(reply: Message) -> None:
    reply.content["more"] = ArrayRecord({"x": Array(np.zeros(1))})


def false_labels(reply: Message) -> None:
    data = saved(np.zeros(2, dtype=np.float64))
    arrays_of(reply)[WEIGHT] = Array(
        dtype="float32", shape=(2, 2), stype="numpy.ndarray", data=data
    )


def normalization(key: str, value: list[float], dtype: str = "float32") -> Spoil:
    return replace_value(key, value, dtype, record="normalization")


def echo(value: object) -> Spoil:
    def spoil(reply: Message) -> None:
        reply.content.config_records["client"].__dict__["_data"]["server-round"] = value

    return spoil


def oldest(reply: Message) -> None:
    reply.content.config_records["client"]["server-round"] = 0


def crash(reply: Message) -> None:
    raise OSError("disk is gone\nTraceback ...")


SPOILED: dict[str, tuple[Spoil, str]] = {
    "negative shape in the header": (
        replace_payload(
            WEIGHT,
            npy_payload("{'descr': '<f4', 'fortran_order': False, 'shape': (-2, -2)}", bytes(16)),
        ),
        "structure",
    ),
    "one NaN": (one(math.nan), "nonfinite"),
    "one inf": (one(math.inf), "nonfinite"),
    "NaN running mean": (one(math.nan, MEAN), "nonfinite"),
    "examples 0": (replace_metric("num-examples", 0), "examples"),
    "examples -10": (replace_metric("num-examples", -10), "examples"),
    "examples NaN": (replace_metric("num-examples", math.nan), "nonfinite"),
    "examples inf": (replace_metric("num-examples", math.inf), "nonfinite"),
    "examples 10**18": (replace_metric("num-examples", 10**18), "examples"),
    "examples 2.5": (replace_metric("num-examples", 2.5), "examples"),
    "examples bool": (replace_metric("num-examples", True), "examples"),
    "examples list": (replace_metric("num-examples", [10]), "examples"),
    "examples empty list": (replace_metric("num-examples", []), "examples"),
    "examples missing": (drop_examples, "examples"),
    "shape (2,) into (2, 2)": (replace_value(WEIGHT, [1, 2], "float32"), "shape"),
    "shape (2, 2) into (2,)": (replace_value(MEAN, [[1, 2], [3, 4]], "float32"), "shape"),
    "shape (1, 2, 2)": (edit_value(WEIGHT, lambda a: a[None]), "shape"),
    "0-dim counter as vector": (replace_value(COUNTER, [3], "int64"), "shape"),
    "float counter": (replace_value(COUNTER, 7.0, "float32"), "dtype"),
    "int32 counter": (replace_value(COUNTER, 7, "int32"), "dtype"),
    "float64 weights": (edit_value(WEIGHT, lambda a: a.astype("f8")), "dtype"),
    "int weights": (edit_value(WEIGHT, lambda a: a.astype("i4")), "dtype"),
    "big-endian weights": (edit_value(WEIGHT, lambda a: a.astype(">f4")), "dtype"),
    "key missing": (drop_array(WEIGHT), "structure"),
    "key extra": (replace_value("backdoor", [1.0]), "structure"),
    "no model": (drop_record("arrays"), "structure"),
    "two models": (second_model, "structure"),
    "no metric record": (drop_record("metrics"), "structure"),
    "two metric records": (second_metric_record, "structure"),
    "false labels": (false_labels, "shape"),
    "NaN metric": (replace_metric("train-loss", math.nan), "nonfinite"),
    "inf in a metric list": (replace_metric("losses", [1.0, math.inf]), "nonfinite"),
    "object payload": (
        replace_payload(WEIGHT, saved(np.array([{}], dtype=object), allow_pickle=True)),
        "structure",
    ),
    "complex payload": (replace_payload(WEIGHT, saved(np.zeros(2, dtype="c8"))), "structure"),
    "text payload": (replace_payload(WEIGHT, saved(np.array(["weights"]))), "structure"),
    "garbage payload": (replace_payload(WEIGHT, b"\x80\x05garbage"), "structure"),
    "empty payload": (replace_payload(WEIGHT, b""), "structure"),
    "truncated payload": (
        replace_payload(WEIGHT, saved(np.zeros((2, 2), dtype="f4"))[:-1]),
        "structure",
    ),
    "trailing payload": (
        replace_payload(WEIGHT, saved(np.zeros((2, 2), dtype="f4")) + b"x"),
        "structure",
    ),
    "another serialization": (replace_payload(WEIGHT, b"x", stype="pickle"), "structure"),
    "lying header": (
        replace_payload(
            WEIGHT,
            npy_payload("{'descr': '<f4', 'fortran_order': False, 'shape': (99999999999,)}"),
        ),
        "structure",
    ),
    "oversize payload": (replace_payload(WEIGHT, bytes(100_000)), "size"),
    "oversize array": (edit_value(WEIGHT, lambda a: np.zeros(10_000, "f4")), "size"),
    "negative variance": (one(-1e-3, VARIANCE), "statistics"),
    "huge running mean": (one(-1e7, MEAN), "statistics"),
    "huge running variance": (one(1e30, VARIANCE), "statistics"),
    "huge scale": (one(1e7, "norm.weight"), "statistics"),
    "huge shift": (one(-1e7, "norm.bias"), "statistics"),
    "counter backwards": (edit_value(COUNTER, lambda a: a - 2), "statistics"),
    "normalization length": (normalization("mean", [0.0]), "statistics"),
    "normalization NaN": (normalization("mean", [0.0, math.nan]), "statistics"),
    "normalization std": (normalization("std", [1.0, -1.0]), "statistics"),
    "normalization huge": (normalization("shift", [1e9, 0.0]), "statistics"),
    "normalization float64": (normalization("mean", [0.0, 1.0], "float64"), "statistics"),
    "normalization matrix": (normalization("mean", [[0.0, 1.0]]), "statistics"),  # type: ignore[list-item]
    "normalization key missing": (drop_array("scale", "normalization"), "statistics"),
    "normalization key extra": (normalization("more", [0.0, 0.0]), "statistics"),
    "normalization oversize": (normalization("mean", [0.0] * 10_000), "size"),
    "round of before": (oldest, "stale"),
    "round as text": (echo("1"), "stale"),
    "round missing": (echo(None), "stale"),
    "client raises": (crash, "error"),
}


@functools.cache
def honest_run(name: str) -> Outcome:
    return run_federation(name, FakeClient(), HONEST)


def check_hostile(outcome: Outcome, name: str, counts: dict[str, int]) -> None:
    """The drops are counted, and nothing else is left of the hostile client."""
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
    """What Flower answers in the name of a node that is offline."""
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
