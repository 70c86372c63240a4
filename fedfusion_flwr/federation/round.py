# SPDX-License-Identifier: Apache-2.0
"""What one round was: the report that a strategy hands to its callbacks."""

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

    ``weights`` (len(clients),) are the final client weights p, zero for those who did not train;
    ``statistics`` (len(clients), D) is what was inferred from, where it is known.
    """

    clients: list[int]
    posterior: FusionPosterior
    mixture: Tensor
    weights: Tensor
    statistics: Tensor | None = None


@dataclass
class RoundReport:
    """Everything that is recorded of a round; filled in as the round goes on.

    ``metrics`` are the numbers of the round by kebab-case name, ``seconds`` where its time went,
    ``clusters`` the cluster (or main component) of every client that has one, ``planted`` the true
    one where it is known, and ``model`` is the served global model after it.
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


class StopRun(Exception):
    """A callback raises it to end a run well after the round it was told of; says why."""


class RoundCallback(Protocol):
    """Sees every round after its evaluation; round 0 is the initial model."""

    def on_round_end(self, report: RoundReport) -> None:
        """Take note of a finished round."""
