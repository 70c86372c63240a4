# SPDX-License-Identifier: Apache-2.0
"""FedCluster by cycling (Chen, Chen, Zhou and Kailkhura, IEEE BigData 2020, "FedCluster: boosting
the convergence of federated learning via cluster-cycling", arXiv 2009.10748).

One global model; clusters are a schedule, not a personalization. The clients are divided at random
into M clusters once. One learning round is M cycles; cycle j of it:
  1. a cohort is drawn from the cluster whose turn it is and trains from w
  2. w <- sum_k n_k w_k / sum_k n_k over that cohort

A Flower round is one cycle, so that a learning round has M aggregations with, all together, the
client work of one round of FedAvg. M = 1 is FedAvg, bit for bit.
"""

from __future__ import annotations

from logging import INFO
from typing import Any

from flwr.common.logger import log

from fedfusion_flwr.config import cohort_size
from fedfusion_flwr.federation.replies import ClientReply
from fedfusion_flwr.federation.round import State
from fedfusion_flwr.randomness import numpy_generator
from fedfusion_flwr.strategies.fedavg import FedAvg


class FedClusterCycling(FedAvg):
    """FedAvg over clusters of clients that take turns.

    Parameters
    ----------
    num_clusters : int
        M; at most as many as there are clients in round 1.
    reshuffle_cycle : bool
        Draw a new order of the clusters for every learning round; without, the last cluster is
        always the freshest.
    **base
        Arguments of `SingleModelStrategy`.
    """

    STATE = (*FedAvg.STATE, "clusters")

    def __init__(self, *, num_clusters: int = 5, reshuffle_cycle: bool = True, **base: Any) -> None:
        super().__init__(**base)
        self.num_clusters = num_clusters
        self.reshuffle_cycle = reshuffle_cycle
        self.clusters: list[list[int]] = []

    @property
    def learning_round(self) -> int:
        """Which learning round the round in progress belongs to, from 0."""
        return (self.server_round - 1) // max(len(self.clusters), 1)

    @property
    def cycle(self) -> int:
        """Which cycle of its learning round the round in progress is, from 0."""
        return (self.server_round - 1) % max(len(self.clusters), 1)

    def sample_clients(self, server_round: int, clients: list[int], size: int) -> list[int]:
        """A cohort of the cluster whose turn it is; of everybody, if nobody of it is connected."""
        self._admit(clients)
        members = sorted(set(self.clusters[self._turn()]) & set(clients)) or clients
        size = cohort_size(len(members), self.fraction_train)
        return super().sample_clients(server_round, members, size)

    def advance(self, replies: list[ClientReply]) -> State:
        """FedAvg of the cohort."""
        self.report.metrics["learning-round"] = float(self.learning_round + 1)
        self.report.metrics["cycle"] = float(self.cycle + 1)
        return super().advance(replies)

    def evaluates(self, server_round: int) -> bool:
        """Only at the end of a learning round, when every cluster had its turn; and at the last."""
        whole, rest = divmod(server_round, max(len(self.clusters), 1))
        due = rest == 0 and whole % self.evaluate_every == 0
        return self.fraction_evaluate > 0 and (due or server_round == self.num_rounds)

    def _admit(self, clients: list[int]) -> None:
        """Divide the clients at first; later ones join the smallest cluster."""
        if not self.clusters:
            order = numpy_generator(self.seed, "clusters").permutation(clients).tolist()
            count = min(self.num_clusters, len(clients))
            self.clusters = [sorted(order[j::count]) for j in range(count)]
        known = {client for cluster in self.clusters for client in cluster}
        for client in clients:
            if client not in known:
                min(self.clusters, key=len).append(client)

    def _turn(self) -> int:
        count = len(self.clusters)
        if not self.reshuffle_cycle:
            return self.cycle
        generator = numpy_generator(self.seed, "cycle-order", self.learning_round)
        return int(generator.permutation(count)[self.cycle])

    def summary(self) -> None:
        """Log the strategy's settings at the start of a run."""
        log(
            INFO,
            "\t├──> FedCluster by cycling: %d clusters in turn, %s order; one round is one cycle",
            *(self.num_clusters, "a new" if self.reshuffle_cycle else "a fixed"),
        )
        super().summary()
