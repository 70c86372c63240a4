# SPDX-License-Identifier: Apache-2.0
"""A Grid inside this process: calls a ClientApp directly, without Ray, threads or sockets.

For tests, sweeps and debugging. Replies are those that the real engine would deliver; if a client
raises, its reply is an error.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable, Iterable

import numpy as np
from flwr.app import Context, Error, Message, RecordDict
from flwr.app.user_config import UserConfig
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode
from flwr.proto.node_pb2 import NodeInfo
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

ClientFn = Callable[[Message, Context], Message]
_NODE_ID_BITS = 62


class InProcessGrid(Grid):
    """A federation of ``num_clients`` nodes whose partition ids follow their registration.

    Parameters
    ----------
    client_app : ClientApp or callable
        Answers every message, given its node's Context.
    num_clients : int
        Number of nodes; each finds ``partition-id`` and ``num-partitions`` in its node config.
    run_config : UserConfig
        What clients find in ``context.run_config``.
    seed : int
        Seeds the node ids, which are random as Flower's are, and the order of replies.
    shuffle_replies : bool
        Deliver replies in a random order.
    """

    run = Run.create_empty(run_id=1)

    def __init__(
        self,
        client_app: ClientApp | ClientFn,
        num_clients: int,
        run_config: UserConfig | None = None,
        *,
        seed: int = 0,
        shuffle_replies: bool = False,
    ) -> None:
        self._client_app = client_app
        self._generator = np.random.default_rng(seed)
        self._shuffle = shuffle_replies
        # A Message takes its sender from here; Flower's engine would have set it.
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1
        self._inbox: dict[str, Message] = {}
        self._sent = 0
        self.run_config: UserConfig = dict(run_config or {})
        self.contexts: dict[int, Context] = {}
        self.nodes: dict[int, NodeInfo] = {}
        for partition_id in range(num_clients):
            self.add_node({"partition-id": partition_id, "num-partitions": num_clients})

    def add_node(self, node_config: UserConfig) -> int:
        """Register one more node and return its node id."""
        node_id = int(self._generator.integers(1, 2**_NODE_ID_BITS))
        moment = datetime.datetime(2000, 1, 1) + datetime.timedelta(seconds=len(self.contexts))
        self.nodes[node_id] = NodeInfo(node_id=node_id, registered_at=moment.isoformat())
        self.contexts[node_id] = Context(
            run_id=1,
            node_id=node_id,
            node_config=node_config,
            state=RecordDict(),
            run_config=self.run_config,
        )
        return node_id

    def remove_node(self, node_id: int) -> None:
        """Disconnect a node; its context stays, so that it can return through ``nodes``."""
        del self.nodes[node_id]

    def set_run(self, run: Run) -> None:
        """Set the run, which this grid does not use."""
        self.run = run

    def create_message(self, *_: object, **__: object) -> Message:
        """Flower's older way to make a message."""
        raise NotImplementedError("make a flwr.app.Message instead")

    def get_node_ids(self) -> Iterable[int]:
        """Ids of the connected nodes, in arbitrary order."""
        return set(self.nodes)

    def get_nodes(self) -> Iterable[NodeInfo]:
        """The connected nodes, in arbitrary order."""
        return [self.nodes[node_id] for node_id in self.get_node_ids()]

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Have every message answered at once; the replies wait to be pulled."""
        ids: list[str] = []
        for message in messages:
            self._sent += 1
            identifier = f"message-{self._sent}"
            message.metadata.__dict__["_message_id"] = identifier
            reply = self._answer(message)
            if reply is not None:
                self._inbox[identifier] = reply
            ids.append(identifier)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Replies to the given messages that have arrived."""
        return [self._inbox.pop(i) for i in message_ids if i in self._inbox]

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Push, answer and pull; ``timeout`` has no meaning here."""
        replies = list(self.pull_messages(self.push_messages(messages)))
        if self._shuffle:
            self._generator.shuffle(replies)
        return replies

    def _answer(self, message: Message) -> Message | None:
        node_id = message.metadata.dst_node_id
        if node_id not in self.nodes:
            return None
        try:
            reply = self._client_app(message, self.contexts[node_id])
        except Exception as error:  # noqa: BLE001 - whatever a client does must not end the run
            reason = f"{type(error).__name__}: {error}"
            return Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason), reply_to=message)
        # As in Flower's engine, the sender is set here and not by the client.
        reply.metadata.__dict__["_src_node_id"] = node_id
        return reply
