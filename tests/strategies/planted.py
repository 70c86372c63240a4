# SPDX-License-Identifier: Apache-2.0
"""Clients whose updates come from planted groups, and a federation of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from flwr.app import Context, Message, MetricRecord, RecordDict
from torch import Tensor

from fedfusion_flwr import protocol
from fedfusion_flwr.federation.in_process_grid import InProcessGrid
from fedfusion_flwr.federation.round import State
from fedfusion_flwr.federation.strategy import FederatedStrategy
from tests.support import FakeClient, Outcome, Recorder

WIDTH = 40


def vector(number: int) -> Tensor:
    """A standard normal draw for every number."""
    return torch.randn(WIDTH, generator=torch.Generator().manual_seed(number))


def start_state(number: int = 0) -> State:
    """A model of two tensors, no normalization layer; numbers give different ones."""
    whole = 3 * vector(1000 + number)
    return {"a.weight": whole[:24].reshape(4, 6), "b.bias": whole[24:]}


def flat(state: State) -> Tensor:
    return torch.cat([value.double().flatten() for value in state.values()])


def moved(state: State, step: Tensor) -> State:
    return {
        "a.weight": state["a.weight"] + step[:24].reshape(4, 6),
        "b.bias": state["b.bias"] + step[24:],
    }


@dataclass
class Listening:
    """Keeps what clients were sent: type, round, client, state and settings."""

    sent: list[tuple[str, int, int, State, dict[str, Any]]] = field(
        default_factory=list, kw_only=True
    )

    def hear(self, message: Message, context: Context) -> tuple[int, int, State, dict[str, Any]]:
        """Client, round, state and settings of a message."""
        client = int(context.node_config["partition-id"])  # type: ignore[arg-type]
        settings: dict[str, Any] = dict(message.content.config_records["config"])
        received = protocol.state_from_record(message.content.array_records["arrays"])
        server_round = settings["server-round"]
        self.sent.append((message.metadata.message_type, server_round, client, received, settings))
        return client, server_round, received, settings

    def sent_for(self, kind: str, server_round: int) -> list[tuple[int, State, dict[str, Any]]]:
        """What clients were sent in a round, in the order of asking: client, state, settings."""
        return [row[2:] for row in self.sent if row[:2] == (kind, server_round)]

    def states_for(self, kind: str, server_round: int) -> dict[int, State]:
        """The state that each client was sent in a round."""
        return {client: state for client, state, _ in self.sent_for(kind, server_round)}

    def rounds_of(self, kind: str) -> list[int]:
        """The rounds in which clients were sent messages of a type."""
        return sorted({row[1] for row in self.sent if row[0] == kind})


@dataclass
class Listener(FakeClient, Listening):
    """The tiny federation's client, which also keeps what it was sent."""

    def __call__(self, message: Message, context: Context) -> Message:
        self.hear(message, context)
        return super().__call__(message, context)


@dataclass
class PlantedClients(Listening):
    """Client k answers w + direction of its group + noise; ``group_of`` gives its group.

    With several models, as IFCA sends them, a client takes the nearest to its group's ``target``.
    """

    group_of: Callable[[int], int] = lambda client: client % 3
    seed: int = 0
    noise: float = 0.3
    step: float = 1.0
    examples: Callable[[int], int] = lambda _: 10

    def direction(self, group: int) -> Tensor:
        return self.step * vector(100 * self.seed + group)

    def update(self, client: int, server_round: int) -> Tensor:
        noise = vector(10_000 + 1000 * self.seed + 50 * client + server_round)
        return self.direction(self.group_of(client)) + self.step * self.noise * noise

    def choose(self, models: list[State], client: int) -> int:
        target = self.direction(self.group_of(client)).double()
        return min(range(len(models)), key=lambda j: float((flat(models[j]) - target).norm()))

    def __call__(self, message: Message, context: Context) -> Message:
        client, server_round, received, settings = self.hear(message, context)
        metrics: dict[str, Any] = {"num-examples": self.examples(client), "gradient-steps": 5}
        state = received
        if "num-models" in settings:
            models = list(protocol.unpack_states(received).values())
            metrics["cluster"] = self.choose(models, client)
            metrics["forward-examples"] = len(models) * self.examples(client)
            state = models[metrics["cluster"]]
        content = RecordDict({"metrics": MetricRecord(metrics)})
        if message.metadata.message_type == "train":
            trained = moved(state, self.update(client, server_round))
            content["arrays"] = protocol.record_from_state(trained)
        return Message(content, reply_to=message)


def run_planted(
    strategy: FederatedStrategy,
    clients: Any,
    num_clients: int,
    rounds: int = 3,
    grid: InProcessGrid | None = None,
    start: State | None = None,
) -> Outcome:
    recorder = Recorder()
    strategy.callbacks.insert(0, recorder)
    grid = grid or InProcessGrid(clients, num_clients, shuffle_replies=True)
    result = strategy.start(grid, protocol.record_from_state(start or start_state()), rounds)
    return Outcome(result, strategy, recorder.reports)


QUIET: dict[str, Any] = {"min_train_nodes": 1, "min_available_nodes": 1, "fraction_evaluate": 0.0}


def same_partition(found: dict[int, int], truth: Callable[[int], int]) -> bool:
    """Whether two clusterings are equal up to the names of the clusters."""
    pairs = {(cluster, truth(client)) for client, cluster in found.items()}
    return len(pairs) == len({c for c, _ in pairs}) == len({g for _, g in pairs})
