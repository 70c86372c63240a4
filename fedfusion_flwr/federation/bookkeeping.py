# SPDX-License-Identifier: Apache-2.0
"""Counts, timings and mean metrics of one round."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from logging import WARNING
from typing import Self

from flwr.app import Message, MetricRecord, RecordDict
from flwr.common.logger import log
from flwr.serverapp.strategy.strategy_utils import aggregate_metricrecords

from fedfusion_flwr import protocol
from fedfusion_flwr.federation.replies import ClientReply
from fedfusion_flwr.federation.round import ClientRow, RoundReport

COSTS = {
    protocol.GRADIENT_STEPS: "client-steps",
    protocol.FORWARD_EXAMPLES: "extra-forward-examples",
}
"""What clients report about their work; summed over clients, not averaged."""

MetricsMean = Callable[[list[RecordDict], str], MetricRecord]


class Timer:
    """A context manager; ``seconds`` is how long it was open."""

    seconds = 0.0

    def __enter__(self) -> Self:
        self._since = time.monotonic()
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds = time.monotonic() - self._since


def count_bytes(messages: Iterable[Message]) -> int:
    """Bytes of the arrays in all messages."""
    return sum(
        len(array.data)
        for message in messages
        if message.has_content()
        for record in message.content.array_records.values()
        for array in record.values()
    )


def book_replies(
    report: RoundReport, replies: Iterable[Message], good: list[ClientReply], bad: list[ClientRow]
) -> None:
    """Count replies, their bytes and the good ones' work; log why each bad one was dropped."""
    report.add("bytes-up", count_bytes(replies))
    for key, name in COSTS.items():
        report.add(name, sum(reply.metrics.get(key, 0.0) for reply in good))
    report.clients = report.clients + bad
    report.add("replies-valid", len(good))
    report.add("replies-dropped", len(bad))
    for row in bad:
        report.add(f"dropped-{row.dropped}", 1)
    log_dropped(report.server_round, "reply", bad)


def log_dropped(server_round: int, what: str, bad: list[ClientRow]) -> None:
    """One warning for every dropped reply, with its client, node and reason."""
    for row in bad:
        log(
            WARNING,
            "round %d: %s of client %s (node %d) dropped (%s): %s",
            *(server_round, what, row.client, row.node, row.dropped, row.detail),
        )


def mean_metrics(good: list[ClientReply], mean: MetricsMean | None) -> dict[str, float]:
    """Average the metrics that all replies share, with Flower's or the user's function."""
    if not good:
        return {}
    # Flower's averaging requires equal keys.
    shared = set.intersection(*(set(reply.metrics) for reply in good))
    shared -= {protocol.TRAIN_STARTED, protocol.CLUSTER, *COSTS}
    records: list[RecordDict] = []
    for reply in good:
        metrics = MetricRecord({key: reply.metrics[key] for key in sorted(shared)})
        metrics[protocol.NUM_EXAMPLES] = reply.num_examples
        records.append(RecordDict({protocol.METRICS: metrics}))
    averaged = (mean or aggregate_metricrecords)(records, protocol.NUM_EXAMPLES)
    return {key: float(v) for key, v in averaged.items() if isinstance(v, int | float)}


def split_train_time(report: RoundReport, good: list[ClientReply]) -> None:
    """Split the wait for replies into time in which some client trained, and transfer.

    If no client says when it trained, all of the wait counts as training.
    """
    intervals = sorted(
        (reply.metrics[protocol.TRAIN_STARTED], reply.metrics[protocol.TRAIN_SECONDS])
        for reply in good
        if {protocol.TRAIN_STARTED, protocol.TRAIN_SECONDS} <= reply.metrics.keys()
    )
    if not intervals:
        return
    busy, until = 0.0, 0.0
    for begin, seconds in intervals:
        busy += max(0.0, begin + seconds - max(begin, until))
        until = max(until, begin + seconds)
    waited = report.seconds["train"]
    report.seconds["train"] = min(busy, waited)
    report.seconds["transfer"] = max(0.0, waited - busy)
