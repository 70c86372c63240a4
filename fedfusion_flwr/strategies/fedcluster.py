# SPDX-License-Identifier: Apache-2.0
"""FedCluster: hierarchical clustering of updates (FL+HC; Briggs, Fan and Andras, IJCNN 2020,
"Federated learning with hierarchical clustering of local updates", arXiv 2004.11791).

Rounds 1 .. n0: FedAvg.
Once, after round n0:
  1. every client trains once from w and returns w_i; its update is w_i - w
  2. agglomerative clustering of the updates, cut at a distance or at a number of clusters
From then on every cluster is a FedAvg of its own from w, its clients sampled within it.
A client seen later trains once from that w and joins the cluster of the nearest mean update.
"""

from __future__ import annotations

from logging import INFO
from typing import Any, Literal

import numpy as np
from flwr.common.logger import log
from torch import Tensor

from fedfusion_flwr import protocol
from fedfusion_flwr.config import cohort_size
from fedfusion_flwr.federation.bounds import (
    count_different,
    gram_matrix,
    principal_coordinates,
    squared_distance,
)
from fedfusion_flwr.federation.engine import Exchange
from fedfusion_flwr.federation.replies import ClientReply
from fedfusion_flwr.federation.round import State
from fedfusion_flwr.federation.sampling import random_cohort
from fedfusion_flwr.randomness import numpy_generator
from fedfusion_flwr.strategies.multi import MultiModelStrategy, in_order_of_appearance

Linkage = Literal["ward", "complete", "average"]


class FedCluster(MultiModelStrategy):
    """FedAvg until one clustering of all clients' updates; then one FedAvg a cluster.

    Parameters
    ----------
    cluster_round : int
        n0, the last round with one model.
    distance_threshold : float
        Clusters farther apart than this, in the norm of the updates, are not merged; 0 merges down
        to ``num_clusters`` instead.
    linkage : {"ward", "complete", "average"}
        What the distance of two clusters is.
    **base
        Arguments of `MultiModelStrategy`.
    """

    STATE = (*MultiModelStrategy.STATE, "origin", "mean_update_models")

    def __init__(
        self,
        *,
        cluster_round: int = 5,
        distance_threshold: float = 0.0,
        linkage: Linkage = "ward",
        **base: Any,
    ) -> None:
        super().__init__(**base)
        self.cluster_round = cluster_round
        self.distance_threshold = distance_threshold
        self.linkage = linkage
        self.origin: State = {}
        self.mean_update_models: list[State] = []

    def prepare_round(self, clients: list[int], exchange: Exchange) -> None:
        """Cluster everybody once; later, place the clients that have no cluster yet."""
        if self.server_round <= self.cluster_round:
            return
        if not self.cluster_models:
            self.origin = self.current
        newcomers = [client for client in clients if client not in self.cluster_of]
        if not newcomers:
            return
        replies = exchange(newcomers, self.origin, {protocol.PHASE: "clustering"})
        if self.cluster_models:
            for reply in replies:
                self.cluster_of[reply.client] = self._nearest(reply)
        elif replies:
            self._cluster(replies)

    def sample_clients(self, server_round: int, clients: list[int], size: int) -> list[int]:
        """Within each cluster, once there are any."""
        if not self.cluster_models:
            return super().sample_clients(server_round, clients, size)
        generator = numpy_generator(self.seed, "sampling", server_round)
        cohort: list[int] = []
        for cluster in range(len(self.cluster_models)):
            members = [c for c in clients if self.cluster_of.get(c) == cluster]
            if members:
                wanted = cohort_size(len(members), self.fraction_train)
                cohort += random_cohort(members, wanted, generator)
        return sorted(cohort)

    def _cluster(self, replies: list[ClientReply]) -> None:
        gram = gram_matrix([reply.state for reply in replies], self.origin)
        labels = agglomerate(
            principal_coordinates(gram),
            self.num_clusters,
            self.distance_threshold,
            self.linkage,
        )
        for reply, label in zip(replies, labels.tolist(), strict=True):
            self.cluster_of[reply.client] = label
        for cluster in range(int(labels.max()) + 1):
            members = [r.state for r in replies if self.cluster_of[r.client] == cluster]
            self.mean_update_models.append(self.mean_of(members))
            self.cluster_models.append(self.current)

    def _nearest(self, reply: ClientReply) -> int:
        distances = [squared_distance(reply.state, mean) for mean in self.mean_update_models]
        return int(np.argmin(distances))

    def summary(self) -> None:
        """Log the strategy's settings at the start of a run."""
        cut = f"{self.num_clusters} clusters"
        if self.distance_threshold:
            cut = f"distance {self.distance_threshold:g}"
        log(
            INFO,
            "\t├──> FedCluster: after round %d, %s linkage, cut at %s",
            *(self.cluster_round, self.linkage, cut),
        )
        super().summary()


def agglomerate(
    points: Tensor, num_clusters: int, distance_threshold: float, linkage: Linkage
) -> np.ndarray:
    """Cluster numbers (K,) of points (K, D), in the order in which the clusters first appear.

    ``distance_threshold`` 0 cuts the tree at ``num_clusters``, or at the number of different points
    where that is less.
    """
    if len(points) == 1:
        return np.zeros(1, dtype=np.int64)
    # Here and not above: the import takes about a second, in every process of a simulation.
    from sklearn.cluster import AgglomerativeClustering

    cut: dict[str, Any] = {"n_clusters": min(num_clusters, count_different(points))}
    if distance_threshold:
        cut = {"n_clusters": None, "distance_threshold": distance_threshold}
    found = AgglomerativeClustering(linkage=linkage, **cut).fit_predict(points.numpy())
    return in_order_of_appearance(found)
