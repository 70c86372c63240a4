# SPDX-License-Identifier: Apache-2.0
"""FedCluster: hierarchical clustering of updates (FL+HC; Briggs, Fan and Andras, IJCNN 2020,
"Federated learning with hierarchical clustering of local updates", arXiv 2004.11791).

Rounds 1 .. n0: FedAvg.
Once, after round n0:
  1. every client trains once from w and returns w_i; its update is w_i - w
  2. agglomerative clustering of the updates, cut at a distance or at a number of clusters
From then on every cluster runs FedAvg by itself, starting from w; clients are sampled within each.
A client seen later trains once from that w and joins the cluster of the nearest mean update.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from fedfusion_flwr import protocol
from fedfusion_flwr.config import Linkage, RunConfig, cohort_size
from fedfusion_flwr.config_rules import at_least, checked, choice
from fedfusion_flwr.federation.bounds import squared_distance
from fedfusion_flwr.federation.replies import ClientReply
from fedfusion_flwr.federation.round import Exchange, State, Update
from fedfusion_flwr.federation.sampling import random_cohort
from fedfusion_flwr.federation.strategy import FederatedStrategy
from fedfusion_flwr.randomness import numpy_generator
from fedfusion_flwr.strategies.clusters import Clusters, mean_of
from fedfusion_flwr.strategies.geometry import (
    agglomerate,
    gram_matrix,
    principal_coordinates,
)


@dataclass
class FedClusterState:
    """The clusters, the model that updates start from, and it plus each cluster's mean update."""

    clusters: Clusters = field(default_factory=Clusters)
    origin: State = field(default_factory=dict)
    mean_update_models: list[State] = field(default_factory=list)


@dataclass(kw_only=True, eq=False, repr=False)
class FedCluster(FederatedStrategy):
    """FedAvg until one clustering of all clients' updates; then one FedAvg per cluster.

    Parameters
    ----------
    num_clusters : int
        Number of clusters to cut the tree into.
    cluster_round : int
        n0, the last round with one model.
    distance_threshold : float
        Clusters farther apart than this, in the norm of the updates, are not merged; 0 merges down
        to ``num_clusters`` instead.
    linkage : {"ward", "complete", "average"}
        How the distance between two clusters is defined.
    """

    name = "fedcluster"
    single_model = False

    num_clusters: int = checked(5, at_least(1))
    cluster_round: int = checked(5, at_least(1))
    distance_threshold: float = checked(0.0, at_least(0))
    linkage: Linkage = choice(Linkage, "ward")
    state: FedClusterState = field(init=False)

    @classmethod
    def rounds_of_equal_steps(cls, config: RunConfig) -> int:
        """``num-server-rounds`` minus the cost of the training before the clustering."""
        return config.rounds_after_one_of_all()

    def initial(self) -> FedClusterState:
        """No clusters yet."""
        return FedClusterState()

    def prepare_round(self, clients: list[int], exchange: Exchange) -> None:
        """Cluster all clients once; later, place the clients that have no cluster yet."""
        state = self.state
        if self.server_round <= self.cluster_round:
            return
        if not state.clusters:
            state.origin = self.current
        newcomers = [client for client in clients if client not in state.clusters.of]
        if not newcomers:
            return
        replies = exchange(newcomers, state.origin, {protocol.PHASE: "clustering"})
        if state.clusters:
            for reply in replies:
                state.clusters.of[reply.client] = self._nearest(reply)
        elif replies:
            self._cluster(replies)

    def sample_clients(self, server_round: int, clients: list[int], size: int) -> list[int]:
        """Within each cluster, once there are any."""
        clusters = self.state.clusters
        if not clusters:
            return super().sample_clients(server_round, clients, size)
        generator = numpy_generator(self.seed, "sampling", server_round)
        cohort: list[int] = []
        for cluster in range(len(clusters.models)):
            members = [c for c in clients if clusters.of.get(c) == cluster]
            if members:
                wanted = cohort_size(len(members), self.fraction_train)
                cohort += random_cohort(members, wanted, generator)
        return sorted(cohort)

    def sent_to(self, client: int) -> State:
        """The model of the client's cluster; the global one while it has none."""
        return self.state.clusters.model_of(client, self.current)

    def advance(self, replies: list[ClientReply]) -> Update:
        """FedAvg; from the clustering on, in every cluster."""
        return self.state.clusters.advance(self, replies)

    def personal_model(self, client: int) -> State:
        """The model of the client's cluster; the served one while it has none."""
        return self.state.clusters.model_of(client, self.served)

    def models(self) -> dict[str, State]:
        """The clusters' models, ``c0``, ``c1``, ..."""
        return self.state.clusters.named()

    def _cluster(self, replies: list[ClientReply]) -> None:
        state = self.state
        gram = gram_matrix([reply.state for reply in replies], state.origin)
        labels = agglomerate(
            principal_coordinates(gram), self.num_clusters, self.distance_threshold, self.linkage
        )
        for reply, label in zip(replies, labels.tolist(), strict=True):
            state.clusters.of[reply.client] = label
        for cluster in range(int(labels.max()) + 1):
            members = [r.state for r in replies if state.clusters.of[r.client] == cluster]
            state.mean_update_models.append(mean_of(self, members))
            state.clusters.models.append(self.current)

    def _nearest(self, reply: ClientReply) -> int:
        means = self.state.mean_update_models
        distances = [squared_distance(reply.state, mean) for mean in means]
        return distances.index(min(distances))

    def settings(self) -> Iterable[str]:
        """When and how the clients are clustered."""
        cut = f"{self.num_clusters} clusters"
        if self.distance_threshold:
            cut = f"distance {self.distance_threshold:g}"
        yield f"FedCluster: after round {self.cluster_round}, {self.linkage} linkage, cut at {cut}"
