# SPDX-License-Identifier: Apache-2.0
"""A round as values: what is in progress, the algorithm's update, the report, what is kept."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import numpy as np
from flwr.app import ArrayRecord
from torch import Tensor

from fedfusion_flwr.federation.roster import Roster
from fedfusion_flwr.fusion import FusionPosterior, ServedAverage, ServerStep

if TYPE_CHECKING:
    from fedfusion_flwr.federation.replies import ClientReply

State = dict[str, Tensor]
Setting = str | int | float | bool | list[str]
Exchange = Callable[[Sequence[int], State, Mapping[str, Setting]], "list[ClientReply]"]
"""Have clients train a model in addition to the round's training; returns the good replies."""


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


@dataclass
class RoundReport:
    """Everything that is recorded of a round; filled in as the round goes on.

    ``metrics`` are the numbers of the round by kebab-case name, ``seconds`` the time by phase,
    ``clusters`` the cluster (or main component) of every client that has one, ``planted`` the true
    one and ``planted_mixtures`` the true mixture (M,) if known, and ``model`` the served global
    model after the round.
    """

    server_round: int
    num_sampled: int = 0
    clients: list[ClientRow] = field(default_factory=list)
    metrics: dict[str, float] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    fusion: FusionSnapshot | None = None
    clusters: dict[int, int] = field(default_factory=dict)
    planted: dict[int, int] = field(default_factory=dict)
    planted_mixtures: dict[int, np.ndarray] = field(default_factory=dict)
    model: State = field(default_factory=dict)
    _since: float = field(default_factory=time.monotonic, init=False, repr=False, compare=False)

    @property
    def dropped(self) -> list[ClientRow]:
        """The replies that did not count."""
        return [row for row in self.clients if row.dropped]

    def add(self, name: str, amount: float) -> None:
        """Add to one of the round's metrics."""
        self.metrics[name] = self.metrics.get(name, 0.0) + amount

    def lap(self, name: str, parts: Mapping[str, float] = {}) -> None:
        """Add the time since the last lap to ``name``; its ``parts`` go to their own names."""
        now = time.monotonic()
        for part, seconds in {name: now - self._since - sum(parts.values()), **parts}.items():
            self.seconds[part] = self.seconds.get(part, 0.0) + seconds
        self._since = now


@dataclass
class RoundInProgress:
    """One round while it lasts: the global model at its start in both forms, and who was asked.

    ``sampled`` has the client id by node id of those asked last, ``sent`` the model that each of
    them was sent, by client id.
    """

    report: RoundReport
    model: State = field(default_factory=dict)
    record: ArrayRecord = field(default_factory=ArrayRecord)
    sampled: dict[int, int] = field(default_factory=dict)
    sent: dict[int, State] = field(default_factory=dict)


@dataclass
class Progress:
    """What every strategy carries from round to round; stored in checkpoints.

    ``newest`` is the global model after ``rounds_done`` rounds; ``clip_bounds`` holds the defence's
    bound by phase.
    """

    average: ServedAverage
    step: ServerStep
    roster: Roster = field(default_factory=Roster)
    rounds_done: int = 0
    newest: State = field(default_factory=dict)
    failed_rounds: int = 0
    clip_bounds: dict[str, float] = field(default_factory=dict)


class KeepOldModel(Exception):
    """A round's replies must not change the model; says why."""


class StopRun(Exception):
    """Raised by a callback to end the run after the current round; says why."""


class RoundCallback(Protocol):
    """Called after the evaluation of every round; round 0 is the initial model."""

    def on_round_end(self, report: RoundReport) -> None:
        """Handle a finished round."""
