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
from fedfusion_flwr.federation.round import Exchange, State
from fedfusion_flwr.federation.sampling import random_cohort
from fedfusion_flwr.randomness import numpy_generator
from fedfusion_flwr.strategies.clusters import ClusteredState, ClusteredStrategy, mean_of
from fedfusion_flwr.strategies.geometry import (
    agglomerate,
    gram_matrix,
    nearest,
    principal_coordinates,
)


@dataclass
class FedClusterState(ClusteredState):
    """The clusters, the model that updates start from, and it plus each cluster's mean update."""

    origin: State = field(default_factory=dict)
    mean_update_models: list[State] = field(default_factory=list)


@dataclass(kw_only=True, eq=False, repr=False)
class FedCluster(ClusteredStrategy):
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
        state, clusters = self.state, self.clusters
        newcomers = [client for client in clients if client not in clusters.of]
        if self.server_round <= self.cluster_round or not newcomers:
            return
        if not clusters:
            state.origin = self.current
        replies = exchange(newcomers, state.origin, {protocol.PHASE: "clustering"})
        if clusters:
            clusters.assign(replies, [nearest(r.state, state.mean_update_models) for r in replies])
        elif replies:
            points = principal_coordinates(gram_matrix([r.state for r in replies], state.origin))
            cut = self.num_clusters, self.distance_threshold, self.linkage
            groups = clusters.assign(replies, agglomerate(points, *cut))
            state.mean_update_models = [mean_of(self, group) for group in groups]
            clusters.models = [self.current] * len(groups)

    def sample_clients(self, server_round: int, clients: list[int], size: int) -> list[int]:
        """Within each cluster, once there are any."""
        clusters = self.clusters
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

    def settings(self) -> Iterable[str]:
        """When and how the clients are clustered."""
        cut = f"{self.num_clusters} clusters"
        if self.distance_threshold:
            cut = f"distance {self.distance_threshold:g}"
        yield f"FedCluster: after round {self.cluster_round}, {self.linkage} linkage, cut at {cut}"
