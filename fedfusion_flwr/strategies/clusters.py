# SPDX-License-Identifier: Apache-2.0
"""Models of groups of clients: every client trains one of them, and is served by one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from logging import WARNING

import torch
from flwr.common.logger import log
from torch import Tensor

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

    def named(self) -> dict[str, State]:
        """The models as ``c0``, ``c1``, ..."""
        return {f"c{j}": state for j, state in enumerate(self.models)}

    def advance(
        self,
        strategy: FederatedStrategy,
        replies: Sequence[ClientReply],
        pool: Iterable[ClientReply] | None = None,
        seconds: Mapping[str, float] | None = None,
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
        seconds : Mapping[str, float] or None
            Time spent on finding the clusters, by name of the part.

        Raises
        ------
        KeepOldModel
            If no fused model is plausible.
        """
        weight_of: dict[int, float] = {}
        if not self.models:
            model = strategy.plausible(strategy.fuse_replies(replies))
            return self._update(model, replies, _weights(replies))
        members: dict[int, list[ClientReply]] = {}
        for reply in replies if pool is None else pool:
            members.setdefault(self.of[reply.client], []).append(reply)
        updated = 0
        for cluster, group in sorted(members.items()):
            fused = strategy.fuse_replies(group)
            problem = strategy.objection(fused, self.models[cluster])
            if problem:
                log(
                    WARNING,
                    "round %d: cluster %d keeps its old model; the fused one is implausible: %s",
                    *(strategy.server_round, cluster, problem),
                )
                continue
            updated += 1
            self.models[cluster] = fused
            weight_of |= _weights(group)
        if not updated:
            raise KeepOldModel("no cluster's fused model was plausible")
        metrics = {"clusters-updated": float(updated)}
        model = mean_of(strategy, self.models)
        return self._update(model, replies, weight_of, metrics, seconds or {})

    def _update(
        self,
        model: State,
        replies: Sequence[ClientReply],
        weight_of: Mapping[int, float],
        metrics: Mapping[str, float] = {},
        seconds: Mapping[str, float] = {},
    ) -> Update:
        sizes = Counter(self.of.values())
        counts = {f"clients-of-c{j}": float(sizes[j]) for j in range(len(self.models))}
        rows = [
            reply.row(weight_of.get(reply.client, 0.0), cluster=self.of.get(reply.client))
            for reply in replies
        ]
        return Update(
            model, rows, {**metrics, **counts}, clusters=dict(self.of), seconds=dict(seconds)
        )


def mean_of(strategy: FederatedStrategy, states: Sequence[Mapping[str, Tensor]]) -> State:
    """The unweighted mean; a single model is returned bit for bit."""
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
    if count > 1 and initial_state is None:
        raise FedFusionError(
            f"{name} with {count} clusters starts from different models: give it "
            "initial_state, a function from 0, 1, ... to state dicts"
        )
    models = [strategy.current]
    for j in range(1, count):
        assert initial_state is not None
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
