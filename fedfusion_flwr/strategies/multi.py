# SPDX-License-Identifier: Apache-2.0
"""Strategies with several models: every client trains one of them, and is served by one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from logging import WARNING
from typing import Any

import numpy as np
import torch
from flwr.common.logger import log
from torch import Tensor

from fedfusion_flwr.errors import FedFusionError
from fedfusion_flwr.federation.bounds import UpdateBound, count_different, squared_distance
from fedfusion_flwr.federation.engine import BaseStrategy, KeepOldModel
from fedfusion_flwr.federation.replies import ClientReply
from fedfusion_flwr.federation.round import State
from fedfusion_flwr.fusion import example_weights
from fedfusion_flwr.randomness import numpy_generator

InitialState = Callable[[int], State]
"""Makes the untrained model of a number: different numbers, different models."""


class MultiModelStrategy(BaseStrategy):
    """Each cluster is a FedAvg of its own; the global model is the clusters' unweighted mean.

    An algorithm overrides `assign` (who belongs to which cluster) and what it needs besides.

    Parameters
    ----------
    num_clusters : int
        The most models that are kept.
    initial_state : Callable[[int], State] or None
        Makes different untrained models, for algorithms that start from several.
    **base
        Arguments of `BaseStrategy`.
    """

    STATE = (*BaseStrategy.STATE, "cluster_models", "cluster_of")

    def __init__(
        self, *, num_clusters: int = 5, initial_state: InitialState | None = None, **base: Any
    ) -> None:
        super().__init__(**base)
        self.num_clusters = num_clusters
        self.initial_state = initial_state
        self.cluster_models: list[State] = []
        self.cluster_of: dict[int, int] = {}

    # --- what an algorithm overrides ------------------------------------------------------------

    def assign(self, replies: list[ClientReply]) -> dict[int, int]:
        """The cluster that each of this round's replies is fused into, by client."""
        return {reply.client: self.cluster_of[reply.client] for reply in replies}

    def pool(self, replies: list[ClientReply]) -> list[ClientReply]:
        """The replies that are fused: this round's, or earlier ones too."""
        return replies

    # --- shared ---------------------------------------------------------------------------------

    def sent_to(self, client: int) -> State:
        """The model of the client's cluster; the global one while it has none."""
        return self._cluster_model(client, self.current)

    def personal_model(self, client: int) -> State:
        """The model of the client's cluster; the global one while it has none."""
        return self._cluster_model(client, self.served)

    def models(self) -> dict[str, State]:
        """The clusters' models, ``c0``, ``c1``, ..."""
        return {f"c{j}": state for j, state in enumerate(self.cluster_models)}

    def advance(self, replies: list[ClientReply]) -> State:
        """Fuse each cluster's replies into its model; a cluster without replies keeps its own."""
        if not self.cluster_models:
            return self.advance_as_one(replies)
        self.cluster_of |= self.assign(replies)
        self._stopwatch.lap(self.report, "infer")
        members: dict[int, list[ClientReply]] = {}
        for reply in self.pool(replies):
            members.setdefault(self.cluster_of[reply.client], []).append(reply)
        weight_of: dict[int, float] = {}
        updated = 0
        for cluster, group in sorted(members.items()):
            fused = self.fuse(group)
            bound = UpdateBound(self.cluster_models[cluster], self.max_update_ratio)
            problem = bound.objection(fused)
            if problem:
                log(
                    WARNING,
                    "round %d: cluster %d keeps its old model: of the fused one, %s",
                    *(self.server_round, cluster, problem),
                )
                continue
            updated += 1
            self.cluster_models[cluster] = fused
            weights = self._weights(group).tolist()
            weight_of |= {r.client: w for r, w in zip(group, weights, strict=True)}
        if not updated:
            raise KeepOldModel("no cluster's fused model was plausible")
        self._book(replies, weight_of)
        self.report.metrics["clusters-updated"] = float(updated)
        return self.global_model()

    def advance_as_one(self, replies: list[ClientReply]) -> State:
        """FedAvg, for rounds in which there are no clusters yet."""
        fused = self.fuse(replies)
        problem = UpdateBound(self.current, self.max_update_ratio).objection(fused)
        if problem:
            raise KeepOldModel(f"of the fused model, {problem}")
        weights = self._weights(replies).tolist()
        self._book(replies, {r.client: w for r, w in zip(replies, weights, strict=True)})
        return fused

    def fuse(self, replies: list[ClientReply]) -> State:
        """Example-weighted mean of the replies' models."""
        return self.fuse_states((reply.state for reply in replies), self._weights(replies))

    def distinct_models(self) -> list[State]:
        """``num_clusters`` untrained models, the global one first.

        Raises
        ------
        FedFusionError
            If there is nothing to make the others of, or two of them are equal: all clients would
            choose the first for ever.
        """
        count, name = self.num_clusters, type(self).__name__
        if count > 1 and self.initial_state is None:
            raise FedFusionError(
                f"{name} with {count} clusters starts from different models: give it "
                "initial_state, a function from 0, 1, ... to state dicts"
            )
        models = [self.current]
        for j in range(1, count):
            assert self.initial_state is not None
            state = self.initial_state(j)
            if any(squared_distance(state, other) == 0 for other in models):
                raise FedFusionError(
                    f"{name}: initial_state({j}) equals an earlier model; seed each differently"
                )
            models.append(state)
        return models

    def global_model(self) -> State:
        """The unweighted mean of the clusters' models."""
        return self.mean_of(self.cluster_models)

    def mean_of(self, states: Sequence[Mapping[str, Tensor]]) -> State:
        """The unweighted mean; of one model, that model bit for bit."""
        if len(states) == 1:
            return dict(states[0])
        weights = torch.full((len(states),), 1 / len(states), dtype=torch.float64)
        return self.fuse_states(states, weights)

    def _cluster_model(self, client: int, otherwise: State) -> State:
        cluster = self.cluster_of.get(client)
        return otherwise if cluster is None else self.cluster_models[cluster]

    def _weights(self, replies: list[ClientReply]) -> Tensor:
        return example_weights(torch.tensor([reply.num_examples for reply in replies]))

    def _book(self, replies: list[ClientReply], weight_of: Mapping[int, float]) -> None:
        """Note each client's cluster and what it counted there."""
        self.report.clients = [
            reply.row(weight_of.get(reply.client, 0.0), cluster=self.cluster_of.get(reply.client))
            for reply in replies
        ] + self.report.clients
        self.report.clusters = dict(self.cluster_of)
        sizes = Counter(self.cluster_of.values())
        for cluster in range(len(self.cluster_models)):
            self.report.metrics[f"clients-of-c{cluster}"] = float(sizes[cluster])


def k_means(points: Tensor, num_clusters: int, seed: int) -> np.ndarray:
    """Cluster numbers (K,) of points (K, D) by k-means++ with ten restarts.

    Numbered in the order in which clusters first appear; fewer clusters where there are fewer
    different points.
    """
    # Here and not above: the import takes about a second, in every process of a simulation.
    from sklearn.cluster import KMeans

    random_state = int(numpy_generator(seed, "k-means").integers(2**31))
    means = KMeans(min(num_clusters, count_different(points)), n_init=10, random_state=random_state)
    return in_order_of_appearance(means.fit_predict(points.numpy()))


def in_order_of_appearance(labels: np.ndarray) -> np.ndarray:
    """The same clusters, numbered 0, 1, ... as they first appear: free of a library's choices."""
    order: dict[int, int] = {}
    return np.array([order.setdefault(int(label), len(order)) for label in labels])
