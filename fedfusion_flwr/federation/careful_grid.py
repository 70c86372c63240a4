# SPDX-License-Identifier: Apache-2.0
"""Fetches devices' replies so that none can end the run or impersonate another node."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from logging import WARNING
from typing import Any

from flwr.app import Error, Message, Metadata, RecordDict
from flwr.app.message import make_message
from flwr.common.constant import SUPERLINK_NODE_ID, ErrorCode
from flwr.common.logger import log
from flwr.proto.node_pb2 import NodeInfo
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from google.protobuf.message import DecodeError

_UNDECODABLE = (
    ArithmeticError,
    AttributeError,
    DecodeError,
    LookupError,
    MemoryError,
    RecursionError,
    TypeError,
    ValueError,
)
"""What decoding raises on malformed bytes; a lost connection raises other errors."""


class CarefulGrid(Grid):
    """Wraps a Grid: fetches replies one by one and attributes each to the node that was asked.

    flwr 1.41 decodes all the replies it fetches before a strategy sees them: one that does not
    decode raises and ends the run. It also reads from a reply who sent it and what it answers,
    and the sender may have written another node's name there. Here a reply that does not decode
    becomes an error reply of its own node, which loses only that node's reply.

    Parameters
    ----------
    grid : Grid
        Flower's.
    poll_seconds : float
        Time between two polls for replies.
    sleep : Callable[[float], None]
        Waits; replaced in tests.
    """

    def __init__(
        self, grid: Grid, poll_seconds: float = 1.0, sleep: Callable[[float], None] = time.sleep
    ) -> None:
        self._grid = grid
        self._poll_seconds = poll_seconds
        self._sleep = sleep

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Push messages and collect a reply to each, until all have arrived or time is up."""
        messages = list(messages)
        pushed = self._grid.push_messages(messages)
        # Ids are in the order of the messages; empty for one that could not be pushed.
        waiting = {
            identifier: message.metadata
            for identifier, message in zip(pushed, messages, strict=True)
            if identifier
        }
        del messages
        deadline = time.monotonic() + (float("inf") if timeout is None else timeout)
        replies: list[Message] = []
        while True:
            for identifier, asked in list(waiting.items()):
                reply = self._pull(identifier, asked)
                if reply is not None:
                    replies.append(reply)
                    del waiting[identifier]
            if not waiting or time.monotonic() >= deadline:
                return replies
            self._sleep(self._poll_seconds)

    def _pull(self, identifier: str, asked: Metadata) -> Message | None:
        """The reply to one message, if it is there."""
        try:
            found = list(self._grid.pull_messages([identifier]))
            if not found:
                return None
            reply = found[0]
            if not isinstance(reply, Message):
                raise TypeError(f"a {type(reply).__name__} instead of a Message")
            if not reply.has_error() and not isinstance(reply.content, RecordDict):
                raise TypeError(f"a {type(reply.content).__name__} instead of a RecordDict")
            claimed = reply.metadata.src_node_id
        except _UNDECODABLE as problem:
            log(WARNING, "the reply of node %d does not decode: %r", asked.dst_node_id, problem)
            return _undecodable(identifier, asked, problem)
        # How Flower reports a lost node. A node that forges this counts as missing too.
        if reply.has_error() and claimed == SUPERLINK_NODE_ID:
            return reply
        if claimed != asked.dst_node_id:
            log(WARNING, "the reply of node %d claims to be from %d", asked.dst_node_id, claimed)
            reply.metadata.__dict__["_src_node_id"] = asked.dst_node_id
        return reply

    # --- forwarded to the wrapped grid ---------------------------------------------------------

    def set_run(self, run: Run) -> None:
        """Set the run."""
        self._grid.set_run(run)

    @property
    def run(self) -> Run:
        """The run."""
        return self._grid.run

    def create_message(self, *arguments: Any, **options: Any) -> Message:
        """Flower's older way to make a message."""
        return self._grid.create_message(*arguments, **options)

    def get_node_ids(self) -> Iterable[int]:
        """Ids of the connected nodes."""
        return self._grid.get_node_ids()

    def get_nodes(self) -> Iterable[NodeInfo]:
        """The connected nodes."""
        return self._grid.get_nodes()

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Push messages; their ids."""
        return self._grid.push_messages(messages)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Replies to the given messages that have arrived."""
        return self._grid.pull_messages(message_ids)


def _undecodable(identifier: str, asked: Metadata, problem: BaseException) -> Message:
    metadata = Metadata(
        run_id=asked.run_id,
        message_id="",
        src_node_id=asked.dst_node_id,
        dst_node_id=asked.src_node_id,
        reply_to_message_id=identifier,
        group_id=asked.group_id,
        created_at=time.time(),
        ttl=asked.ttl,
        message_type=asked.message_type,
    )
    reason = f"the reply does not decode ({type(problem).__name__})"
    return make_message(metadata=metadata, error=Error(ErrorCode.MESSAGE_UNAVAILABLE, reason))
