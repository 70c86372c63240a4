# SPDX-License-Identifier: Apache-2.0
"""FeSEM (Xie et al. 2020, "Multi-center federated learning", arXiv 2005.01026).

Minimizes sum_k sum_i n_i r_ik ||W_i - C_k||^2 over centres C_k and one-hot r, W_i being client i's
latest local model and n_i its examples (1 for all in the first version of the paper). Round:
  1. every client of the cohort trains from its centre and returns W_i
  2. E: r_i = argmin_k ||W_i - C_k|| over the parameters, for every client that ever returned one
  3. M: C_k = example-weighted mean of its clients' W_i

Centres must start apart. With warm start every client trains once from w_0 and k-means++ on the
W_i gives the first centres; without, they are independently initialized models, whose distances
are then those of the initializations rather than of the data.
"""

from __future__ import annotations

from logging import INFO
from typing import Any, Literal

from flwr.common.logger import log

from fedfusion_flwr import protocol
from fedfusion_flwr.federation.bounds import gram_matrix, principal_coordinates, squared_distance
from fedfusion_flwr.federation.engine import Exchange
from fedfusion_flwr.federation.replies import ClientReply
from fedfusion_flwr.strategies.multi import MultiModelStrategy, k_means


class FeSEM(MultiModelStrategy):
    """Expectation maximization over the clients' models.

    The server keeps the latest model of every client it has seen.

    Parameters
    ----------
    centre_update : {"all", "round"}
        Whether a centre is the mean of all its clients' latest models (the paper), or of those who
        trained in this round.
    warm_start : bool
        Find the first centres by one training of every client.
    **base
        Arguments of `MultiModelStrategy`.
    """

    STATE = (*MultiModelStrategy.STATE, "latest")

    def __init__(
        self,
        *,
        centre_update: Literal["all", "round"] = "all",
        warm_start: bool = True,
        **base: Any,
    ) -> None:
        super().__init__(**base)
        self.centre_update = centre_update
        self.warm_start = warm_start
        self.latest: dict[int, ClientReply] = {}

    def prepare_round(self, clients: list[int], exchange: Exchange) -> None:
        """Find the first centres."""
        if self.cluster_models:
            return
        if not self.warm_start:
            self.cluster_models = self.distinct_models()
            return
        replies = exchange(clients, self.current, {protocol.PHASE: "warm-start"})
        if not replies:
            return
        points = principal_coordinates(gram_matrix([r.state for r in replies], self.current))
        labels = k_means(points, self.num_clusters, self.seed).tolist()
        self.latest = {reply.client: reply for reply in replies}
        self.cluster_of = dict(zip(self.latest, labels, strict=True))
        self.cluster_models = [
            self.fuse([r for r in replies if self.cluster_of[r.client] == cluster])
            for cluster in range(max(labels) + 1)
        ]

    def assign(self, replies: list[ClientReply]) -> dict[int, int]:
        """E: the nearest centre of every client's latest model; of equals the first."""
        self.latest |= {reply.client: reply for reply in replies}
        return {client: self._nearest(reply) for client, reply in self.latest.items()}

    def pool(self, replies: list[ClientReply]) -> list[ClientReply]:
        """Whose models the M step averages."""
        return replies if self.centre_update == "round" else list(self.latest.values())

    def _nearest(self, reply: ClientReply) -> int:
        distances = [squared_distance(reply.state, centre) for centre in self.cluster_models]
        return distances.index(min(distances))

    def summary(self) -> None:
        """Log the strategy's settings at the start of a run."""
        log(
            INFO,
            "\t├──> FeSEM: %d centres, warm start %s, centres are means of %s",
            self.num_clusters,
            "on" if self.warm_start else "off",
            "all their clients" if self.centre_update == "all" else "the round's clients",
        )
        super().summary()
