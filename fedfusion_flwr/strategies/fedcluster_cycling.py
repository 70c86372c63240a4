# SPDX-License-Identifier: Apache-2.0
"""FedCluster by cycling (Chen, Chen, Zhou and Kailkhura, IEEE BigData 2020, "FedCluster: boosting
the convergence of federated learning via cluster-cycling", arXiv 2009.10748).

One global model; clusters are a schedule, not a personalization. The clients are divided at random
into M clusters once. One learning round is M cycles; cycle j of it:
  1. a cohort is drawn from the cluster whose turn it is and trains from w
  2. w <- sum_k n_k w_k / sum_k n_k over that cohort

A Flower round is one cycle: a learning round has M aggregations for the client work of one round of
FedAvg. M = 1 is FedAvg, bit for bit.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass, field

from fedfusion_flwr.config import RunConfig, cohort_size
from fedfusion_flwr.config_rules import at_least, checked
from fedfusion_flwr.federation.replies import ClientReply, weights_by_examples
from fedfusion_flwr.federation.round import Update
from fedfusion_flwr.federation.strategy import FederatedStrategy
from fedfusion_flwr.randomness import numpy_generator


@dataclass
class CyclingState:
    """The clients of every cluster; empty before the first round."""

    clusters: list[list[int]] = field(default_factory=list)


@dataclass(kw_only=True, eq=False, repr=False)
class FedClusterCycling(FederatedStrategy):
    """FedAvg over clusters of clients that take turns.

    Parameters
    ----------
    num_clusters : int
        M; at most as many as there are clients in round 1.
    reshuffle_cycle : bool
        Draw a new order of the clusters for every learning round; otherwise the same cluster
        always trains last.
    """

    name = "fedcluster-cycling"

    num_clusters: int = checked(5, at_least(1))
    reshuffle_cycle: bool = True
    state: CyclingState = field(init=False)

    @classmethod
    def rounds_of_equal_steps(cls, config: RunConfig) -> int:
        """A round trains one cluster's share of the clients."""
        return config.num_server_rounds * min(config.num_clusters, config.num_clients)

    def initial(self) -> CyclingState:
        """No division yet."""
        return CyclingState()

    @property
    def place(self) -> tuple[int, int]:
        """The learning round and its cycle, both from 0."""
        return divmod(self.server_round - 1, len(self.state.clusters))

    def sample_clients(self, server_round: int, clients: list[int], size: int) -> list[int]:
        """A cohort of the cluster whose turn it is; of all clients, if none of it is connected."""
        self._admit(clients)
        members = sorted(set(self.state.clusters[self._turn()]) & set(clients)) or clients
        size = cohort_size(len(members), self.fraction_train)
        return super().sample_clients(server_round, members, size)

    def advance(self, replies: list[ClientReply]) -> Update:
        """FedAvg of the cohort."""
        update = self.weighted_update(replies, weights_by_examples(replies))
        learning_round, cycle = (float(number + 1) for number in self.place)
        place = {"learning-round": learning_round, "cycle": cycle}
        return dataclasses.replace(update, metrics={**place, **update.metrics})

    def evaluates(self, server_round: int) -> bool:
        """After the last cycle of a learning round, and in the last round of the run."""
        whole, rest = divmod(server_round, max(len(self.state.clusters), 1))
        due = rest == 0 and whole % self.evaluate_every == 0
        return self.fraction_evaluate > 0 and (due or server_round == self.num_rounds)

    def _admit(self, clients: list[int]) -> None:
        """Divide the clients once; later ones join the smallest cluster."""
        if not self.state.clusters:
            order = numpy_generator(self.seed, "clusters").permutation(clients).tolist()
            count = min(self.num_clusters, len(clients))
            self.state.clusters = [sorted(order[j::count]) for j in range(count)]
        known = {client for cluster in self.state.clusters for client in cluster}
        for client in clients:
            if client not in known:
                min(self.state.clusters, key=len).append(client)

    def _turn(self) -> int:
        learning_round, cycle = self.place
        if not self.reshuffle_cycle:
            return cycle
        generator = numpy_generator(self.seed, "cycle-order", learning_round)
        return int(generator.permutation(len(self.state.clusters))[cycle])

    def settings(self) -> Iterable[str]:
        """Clusters and their order."""
        order = "a new" if self.reshuffle_cycle else "a fixed"
        yield (
            f"FedCluster by cycling: {self.num_clusters} clusters in turn, {order} order; "
            "one round is one cycle"
        )
