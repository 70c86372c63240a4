# SPDX-License-Identifier: Apache-2.0
"""The outcome of a round: the algorithm's update, and the report that callbacks see."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from fedfusion_flwr.fusion import FusionPosterior

State = dict[str, Tensor]


@dataclass(frozen=True)
class ClientRow:
    """One client in one round; ``dropped`` names why a reply did not count."""

    client: int | None
    node: int
    partition: int | None = None
    num_examples: int | None = None
    weight: float = 0.0
    assignment: list[float] | None = None
    cluster: int | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    dropped: str | None = None
    detail: str | None = None


@dataclass(frozen=True)
class FusionSnapshot:
    """The inference behind a round: ``clients`` are the rows of the posterior's assignments.

    ``weights`` (len(clients),) are the final client weights p, zero for clients that did not train;
    ``statistics`` (len(clients), D) are the inputs of the inference, if known.
    """

    clients: list[int]
    posterior: FusionPosterior
    mixture: Tensor
    weights: Tensor
    statistics: Tensor | None = None


@dataclass(frozen=True)
class Update:
    """What an algorithm computes from a round's replies.

    Attributes
    ----------
    model : State
        The next global model.
    rows : list[ClientRow]
        One for each reply, with its weight.
    metrics : dict[str, float]
        Numbers of the round, by kebab-case name.
    clusters : dict[int, int]
        The cluster (or main component) of every client that has one.
    fusion : FusionSnapshot or None
        The inference, where there was one.
    seconds : dict[str, float]
        Time spent, by name of the part; the rest is aggregation.
    """

    model: State
    rows: list[ClientRow]
    metrics: dict[str, float] = field(default_factory=dict)
    clusters: dict[int, int] = field(default_factory=dict)
    fusion: FusionSnapshot | None = None
    seconds: dict[str, float] = field(default_factory=dict)


class KeepOldModel(Exception):
    """A round's replies must not change the model; says why."""


@dataclass
class RoundReport:
    """Everything that is recorded of a round; filled in as the round goes on.

    ``metrics`` are the numbers of the round by kebab-case name, ``seconds`` the time by phase,
    ``clusters`` the cluster (or main component) of every client that has one, ``planted`` the true
    one if known, and ``model`` the served global model after the round.
    """

    server_round: int
    num_sampled: int = 0
    clients: list[ClientRow] = field(default_factory=list)
    metrics: dict[str, float] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    fusion: FusionSnapshot | None = None
    clusters: dict[int, int] = field(default_factory=dict)
    planted: dict[int, int] = field(default_factory=dict)
    model: State = field(default_factory=dict)

    @property
    def dropped(self) -> list[ClientRow]:
        """The replies that did not count."""
        return [row for row in self.clients if row.dropped]

    def add(self, name: str, amount: float) -> None:
        """Add to one of the round's metrics."""
        self.metrics[name] = self.metrics.get(name, 0.0) + amount

    def book(self, update: Update) -> None:
        """Add the algorithm's update."""
        self.clients = update.rows + self.clients
        self.metrics |= update.metrics
        self.clusters, self.fusion = update.clusters, update.fusion


class StopRun(Exception):
    """Raised by a callback to end the run after the current round; says why."""


class RoundCallback(Protocol):
    """Called after the evaluation of every round; round 0 is the initial model."""

    def on_round_end(self, report: RoundReport) -> None:
        """Handle a finished round."""
