# SPDX-License-Identifier: Apache-2.0
"""FeSEM (Xie et al. 2020, "Multi-center federated learning", arXiv 2005.01026).

Minimizes sum_k sum_i n_i r_ik ||W_i - C_k||^2 over centres C_k and one-hot r, W_i being client i's
latest local model and n_i its examples (1 for all in the first version of the paper). Round:
  1. every client of the cohort trains from its centre and returns W_i
  2. E: r_i = argmin_k ||W_i - C_k|| over the parameters, for every client that ever returned one
  3. M: C_k = example-weighted mean of its clients' W_i

Centres must start apart. With a warm start, every client trains once from w_0 and k-means++ on the
W_i gives the first centres. Otherwise they are independently initialized models, whose distances
come from the initialization rather than from the data.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from fedfusion_flwr import protocol
from fedfusion_flwr.config import CentreUpdate, RunConfig
from fedfusion_flwr.config_rules import choice
from fedfusion_flwr.federation.bookkeeping import Timer
from fedfusion_flwr.federation.replies import ClientReply
from fedfusion_flwr.federation.round import Exchange, Update
from fedfusion_flwr.strategies.clusters import (
    ClusteredState,
    ClusteredStrategy,
    InitialState,
    distinct_models,
)
from fedfusion_flwr.strategies.geometry import gram_matrix, k_means, nearest, principal_coordinates


@dataclass
class FeSEMState(ClusteredState):
    """The centres, and the latest reply of every client."""

    latest: dict[int, ClientReply] = field(default_factory=dict)


@dataclass(kw_only=True, eq=False, repr=False)
class FeSEM(ClusteredStrategy):
    """Expectation maximization over the clients' latest models, which the server keeps.

    Parameters
    ----------
    num_clusters : int
        Largest number of centres.
    centre_update : {"all", "round"}
        Whether a centre is the mean of all its clients' latest models (the paper), or of those that
        were trained in this round.
    warm_start : bool
        Find the first centres by one training of every client.
    initial_state : Callable[[int], State] or None
        Makes different untrained models; needed without a warm start.
    """

    name = "fesem"

    centre_update: CentreUpdate = choice(CentreUpdate, "all")
    warm_start: bool = True
    initial_state: InitialState | None = None
    state: FeSEMState = field(init=False)

    @classmethod
    def rounds_of_equal_steps(cls, config: RunConfig) -> int:
        """``num-server-rounds`` minus the cost of the warm start, if there is one."""
        return config.rounds_after_one_of_all() if config.warm_start else config.num_server_rounds

    def initial(self) -> FeSEMState:
        """No centres yet."""
        return FeSEMState()

    def prepare_round(self, clients: list[int], exchange: Exchange) -> None:
        """Find the first centres."""
        clusters = self.clusters
        if clusters:
            return
        if not self.warm_start:
            clusters.models = distinct_models(self, self.num_clusters, self.initial_state)
            return
        replies = exchange(clients, self.current, {protocol.PHASE: "warm-start"})
        if replies:
            points = principal_coordinates(gram_matrix([r.state for r in replies], self.current))
            groups = clusters.assign(replies, k_means(points, self.num_clusters, self.seed))
            clusters.models = [self.fuse_replies(group) for group in groups]
            self.state.latest = {reply.client: reply for reply in replies}

    def assign(self, replies: list[ClientReply]) -> dict[int, int]:
        """E: the nearest centre of every client's latest model; ties go to the first."""
        self.state.latest |= {reply.client: reply for reply in replies}
        return {
            client: nearest(reply.state, self.clusters.models)
            for client, reply in self.state.latest.items()
        }

    def advance(self, replies: list[ClientReply]) -> Update:
        """E, then M: each centre's new mean."""
        with Timer() as timer:
            self.clusters.of |= self.assign(replies) if self.clusters else {}
        pool = replies if self.centre_update == "round" else self.state.latest.values()
        return self.clusters.advance(self, replies, pool, {"infer": timer.seconds})

    def settings(self) -> Iterable[str]:
        """Centres and their start."""
        start = "on" if self.warm_start else "off"
        whose = "all their" if self.centre_update == "all" else "the round's"
        yield (
            f"FeSEM: {self.num_clusters} centres, warm start {start}, "
            f"centres are means of {whose} clients"
        )
