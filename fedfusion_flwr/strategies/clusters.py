# SPDX-License-Identifier: Apache-2.0
"""Models of groups of clients, and what the strategies that keep such models share."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from logging import WARNING

import torch
from flwr.common.logger import log

from fedfusion_flwr.config_rules import at_least, checked
from fedfusion_flwr.errors import FedFusionError
from fedfusion_flwr.federation.bounds import squared_distance
from fedfusion_flwr.federation.replies import ClientReply, weights_by_examples
from fedfusion_flwr.federation.round import KeepOldModel, State, Update
from fedfusion_flwr.federation.strategy import FederatedStrategy

InitialState = Callable[[int], State]
"""Makes an untrained model; different numbers give different models."""


@dataclass
class Clusters:
    """The clusters of a strategy; each runs FedAvg by itself.

    Attributes
    ----------
    models : list[State]
        One per cluster; empty while there are no clusters.
    of : dict[int, int]
        The cluster of every client that has one.
    """

    models: list[State] = field(default_factory=list)
    of: dict[int, int] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.models)

    def model_of(self, client: int, otherwise: State) -> State:
        """The model of the client's cluster, or ``otherwise`` if it has none."""
        cluster = self.of.get(client)
        return otherwise if cluster is None else self.models[cluster]

    def assign(
        self, replies: Sequence[ClientReply], labels: Iterable[int]
    ) -> list[list[ClientReply]]:
        """Give each reply's client its label; the replies of clusters 0, 1, ..."""
        self.of |= {reply.client: label for reply, label in zip(replies, labels, strict=True)}
        return [group for _, group in self._by_cluster(replies)]

    def advance(
        self,
        strategy: FederatedStrategy,
        replies: Sequence[ClientReply],
        pool: Iterable[ClientReply] | None = None,
        seconds: Mapping[str, float] = {},
    ) -> Update:
        """Fuse each cluster's replies into its model; a cluster without replies keeps its model.

        The global model is the clusters' unweighted mean; while there are no clusters it is
        FedAvg's.

        Parameters
        ----------
        strategy : FederatedStrategy
            Fuses the models.
        replies : Sequence[ClientReply]
            This round's; once there are clusters, every client has one.
        pool : Iterable[ClientReply] or None
            The replies to fuse; by default this round's.
        seconds : Mapping[str, float]
            Time spent on finding the clusters, by name of the part.

        Raises
        ------
        KeepOldModel
            If no fused model is plausible.
        """
        metrics: dict[str, float] = {}
        if self.models:
            weight_of = self._fuse(strategy, replies if pool is None else pool)
            model = mean_of(strategy, self.models)
            metrics["clusters-updated"] = float(len({self.of[client] for client in weight_of}))
        else:
            model, seconds = strategy.plausible(strategy.fuse_replies(replies)), {}
            weight_of = _weights(replies)
        sizes = Counter(self.of.values())
        metrics |= {f"clients-of-c{j}": float(sizes[j]) for j in range(len(self.models))}
        rows = [
            reply.row(weight_of.get(reply.client, 0.0), cluster=self.of.get(reply.client))
            for reply in replies
        ]
        return Update(model, rows, metrics, clusters=dict(self.of), seconds=dict(seconds))

    def _fuse(
        self, strategy: FederatedStrategy, replies: Iterable[ClientReply]
    ) -> dict[int, float]:
        """Update the models; the weight of every client in its cluster's new model."""
        weight_of: dict[int, float] = {}
        for cluster, group in self._by_cluster(replies):
            fused = strategy.fuse_replies(group)
            problem = strategy.objection(fused, self.models[cluster])
            if problem:
                log(
                    WARNING,
                    "round %d: cluster %d keeps its old model; the fused one is implausible: %s",
                    *(strategy.server_round, cluster, problem),
                )
            else:
                self.models[cluster] = fused
                weight_of |= _weights(group)
        if not weight_of:
            raise KeepOldModel("no cluster's fused model was plausible")
        return weight_of

    def _by_cluster(self, replies: Iterable[ClientReply]) -> list[tuple[int, list[ClientReply]]]:
        """The clusters that have replies, in order, and those."""

        def cluster_of(reply: ClientReply) -> int:
            return self.of[reply.client]

        groups = itertools.groupby(sorted(replies, key=cluster_of), cluster_of)
        return [(cluster, list(group)) for cluster, group in groups]


@dataclass
class ClusteredState:
    """The clusters of a `ClusteredStrategy`; strategies add what else they remember."""

    clusters: Clusters = field(default_factory=Clusters)


@dataclass(kw_only=True, eq=False, repr=False)
class ClusteredStrategy(FederatedStrategy):
    """Every client trains, and is served, the model of its cluster; the global one without any."""

    single_model = False

    num_clusters: int = checked(5, at_least(1))
    state: ClusteredState = field(init=False)

    def initial(self) -> ClusteredState:
        """No clusters yet."""
        return ClusteredState()

    @property
    def clusters(self) -> Clusters:
        """The clusters so far."""
        return self.state.clusters

    def sent_to(self, client: int) -> State:
        """The model of the client's cluster; the global one while it has none."""
        return self.clusters.model_of(client, self.current)

    def advance(self, replies: list[ClientReply]) -> Update:
        """FedAvg in every cluster."""
        return self.clusters.advance(self, replies)

    def personal_model(self, client: int) -> State:
        """The model of the client's cluster; the served one while it has none."""
        return self.clusters.model_of(client, self.served)

    def models(self) -> dict[str, State]:
        """The clusters' models, ``c0``, ``c1``, ..."""
        return {f"c{j}": state for j, state in enumerate(self.clusters.models)}


def mean_of(strategy: FederatedStrategy, models: Sequence[State | ClientReply]) -> State:
    """The unweighted mean of models, or of those in replies; a single one bit for bit."""
    states = [model.state if isinstance(model, ClientReply) else model for model in models]
    if len(states) == 1:
        return dict(states[0])
    return strategy.fuse(states, torch.full((len(states),), 1 / len(states), dtype=torch.float64))


def distinct_models(
    strategy: FederatedStrategy, count: int, initial_state: InitialState | None
) -> list[State]:
    """``count`` untrained models, the global one first.

    Raises
    ------
    FedFusionError
        If ``initial_state`` is missing, or two models are equal: all clients would always choose
        the first of them.
    """
    name = type(strategy).__name__
    models = [strategy.current]
    for j in range(1, count):
        if initial_state is None:
            raise FedFusionError(
                f"{name} with {count} clusters starts from different models: give it "
                "initial_state, a function from 0, 1, ... to state dicts"
            )
        state = initial_state(j)
        if any(squared_distance(state, other) == 0 for other in models):
            raise FedFusionError(
                f"{name}: initial_state({j}) equals an earlier model; seed each differently"
            )
        models.append(state)
    return models


def _weights(replies: Sequence[ClientReply]) -> dict[int, float]:
    weights = weights_by_examples(replies).tolist()
    return {reply.client: weight for reply, weight in zip(replies, weights, strict=True)}
