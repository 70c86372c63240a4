# SPDX-License-Identifier: Apache-2.0
"""Replies that do not decode or carry another node's name: only their own node loses its reply."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest
from flwr.app import Error, Message
from flwr.app.message import make_message
from flwr.common.constant import SUPERLINK_NODE_ID
from google.protobuf.message import DecodeError

from fedfusion_flwr.federation.careful_grid import CarefulGrid
from tests.support import FakeClient, TamperingGrid, assert_identical, run_federation

CLIENTS = 4
HOSTILE = 3


class Pulling(TamperingGrid):
    """As Flower's grid of devices does: replies are decoded, or not, when they are pulled."""

    def __init__(self, hostile: Callable[[Message], Message], count: int = CLIENTS) -> None:
        super().__init__(FakeClient(), count)
        self.hostile = hostile
        self.pulled: list[int] = []

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        message_ids = list(message_ids)
        self.pulled.append(len(message_ids))
        replies = []
        for reply in super().pull_messages(message_ids):
            partition = self.contexts[reply.metadata.src_node_id].node_config["partition-id"]
            replies.append(self.hostile(reply) if partition == HOSTILE else reply)
        return replies

    def node(self, partition: int) -> int:
        found = {c.node_config["partition-id"]: node for node, c in self.contexts.items()}
        return found[partition]


def raising(problem: Exception) -> Callable[[Message], Message]:
    def hostile(reply: Message) -> Message:
        raise problem

    return hostile


def run(grid: Pulling) -> Any:
    careful = CarefulGrid(grid, sleep=lambda _: None)
    return run_federation("fedavg", None, CLIENTS, grid=careful)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "problem",
    [
        ValueError("Unexpected set of `children`"),
        UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"),
        KeyError("0f"),
        IndexError("list index out of range"),
        TypeError("Invalid arguments for Array"),
        DecodeError("Error parsing message"),
        RecursionError("maximum recursion depth exceeded"),
        MemoryError(),
    ],
    ids=lambda problem: type(problem).__name__,
)
def test_a_reply_that_does_not_decode_is_one_dropped_reply(problem: Exception) -> None:
    outcome = run(Pulling(raising(problem)))
    honest = run_federation("fedavg", FakeClient(), HOSTILE)
    assert_identical(outcome.state, honest.state)
    (row,) = outcome.reports[1].dropped
    assert (row.client, row.dropped) == (HOSTILE, "error")
    assert row.detail == f"the reply does not decode ({type(problem).__name__})"


def test_an_object_of_another_kind_is_not_a_reply() -> None:
    outcome = run(Pulling(lambda reply: reply.content))  # type: ignore[arg-type, return-value]
    (row,) = outcome.reports[1].dropped
    assert (row.client, row.dropped) == (HOSTILE, "error")


def test_who_answers_is_who_was_asked() -> None:
    """A reply in the name of client 0 counts for its sender, and client 0 loses nothing."""
    grid = Pulling(lambda reply: reply)

    def forge(reply: Message) -> Message:
        reply.metadata.__dict__["_src_node_id"] = grid.node(0)
        reply.metadata.__dict__["_reply_to_message_id"] = "message-1"
        return reply

    grid.hostile = forge
    outcome = run(grid)
    assert_identical(outcome.state, run_federation("fedavg", FakeClient(), CLIENTS).state)
    assert not outcome.reports[1].dropped


def test_an_error_in_anothers_name_is_its_senders_too() -> None:
    grid = Pulling(lambda reply: reply)

    def forge(reply: Message) -> Message:
        error = make_message(metadata=reply.metadata, error=Error(1, "I am client 0"))
        error.metadata.__dict__["_src_node_id"] = grid.node(0)
        return error

    grid.hostile = forge
    outcome = run(grid)
    assert_identical(outcome.state, run_federation("fedavg", FakeClient(), HOSTILE).state)
    assert [(row.client, row.dropped) for row in outcome.reports[1].dropped] == [(HOSTILE, "error")]


def test_a_node_that_flower_reports_lost_stays_missing() -> None:
    def gone(reply: Message) -> Message:
        error = make_message(metadata=reply.metadata, error=Error(1, "node is not available"))
        error.metadata.__dict__["_src_node_id"] = SUPERLINK_NODE_ID
        return error

    (row,) = run(Pulling(gone)).reports[1].dropped
    assert (row.client, row.dropped) == (HOSTILE, "missing")


def test_without_the_care_such_a_reply_ends_the_run() -> None:
    """Why the care is needed; flwr's own loop fetches all replies at once, too."""
    with pytest.raises(KeyError):
        run_federation("fedavg", None, CLIENTS, grid=Pulling(raising(KeyError())))  # type: ignore[arg-type]


def test_a_lost_connection_still_raises() -> None:
    with pytest.raises(ConnectionError):
        run(Pulling(raising(ConnectionError("the SuperLink is gone"))))


def test_late_and_missing_replies() -> None:
    """Each message is polled by itself until all replies have arrived or time is up."""

    class Slow(Pulling):
        looks = 0

        def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
            self.looks += 1
            return super().pull_messages(message_ids) if self.looks > 6 else []

    grid = Slow(lambda reply: reply)
    naps: list[float] = []
    careful = CarefulGrid(grid, poll_seconds=0.5, sleep=naps.append)
    outcome = run_federation("fedavg", None, CLIENTS, rounds=1, grid=careful)  # type: ignore[arg-type]
    assert outcome.train_metrics(1)["replies-valid"] == CLIENTS
    assert naps == [0.5, 0.5]
    assert set(grid.pulled) == {1}

    never = CarefulGrid(Slow(lambda reply: reply), sleep=lambda _: None)
    assert list(never.send_and_receive([], timeout=0)) == []
