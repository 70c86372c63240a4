# SPDX-License-Identifier: Apache-2.0
"""FedGroup (Duan et al. 2021, "FedGroup: efficient clustered federated learning via decomposed
data-driven measure", arXiv 2010.06870).

Cold start, once:
  1. alpha m clients train a few steps from w_0; their updates are D_i = w_i - w_0
  2. V: the m left singular directions of the updates (not centred); E_ik = cos(D_i, v_k)
  3. k-means with m clusters on the rows of E (EDC: Euclidean distance of decomposed cosines)
  4. group g: the uniform mean of its members' models; its direction, the mean of their updates
Newcomer, when first selected: trains those steps from w_0, joins argmin_g (1 - cos(D, D_g)) / 2.
Round: every group runs FedAvg by itself over its selected members; assignments never change.
Optionally: w_g <- (w_g + eta sum_{l != g} w_l / ||w_l||) / (1 + eta sum_{l != g} 1 / ||w_l||).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch

from fedfusion_flwr import protocol
from fedfusion_flwr.config import RunConfig
from fedfusion_flwr.config_rules import at_least, checked
from fedfusion_flwr.federation.bookkeeping import Timer
from fedfusion_flwr.federation.bounds import difference, inner_product, squared_distance
from fedfusion_flwr.federation.replies import ClientReply
from fedfusion_flwr.federation.round import Exchange, State, Update
from fedfusion_flwr.federation.sampling import random_cohort
from fedfusion_flwr.fusion.threads import one_thread
from fedfusion_flwr.randomness import numpy_generator
from fedfusion_flwr.strategies.clusters import ClusteredState, ClusteredStrategy, mean_of
from fedfusion_flwr.strategies.geometry import decomposed_cosines, gram_matrix, k_means


@dataclass
class FedGroupState(ClusteredState):
    """The groups, the model that updates start from, and each group's mean first update."""

    origin: State = field(default_factory=dict)
    directions: list[State] = field(default_factory=list)


@dataclass(kw_only=True, eq=False, repr=False)
class FedGroup(ClusteredStrategy):
    """Static groups by the directions of the clients' first updates.

    Parameters
    ----------
    num_clusters : int
        m, the largest number of groups.
    pretrain_steps : int
        Gradient steps of the cold start, and of a newcomer.
    pretrain_clients : int
        alpha: clients per group that take part in the cold start.
    inter_group_rate : float
        eta_G of the aggregation between groups; 0 turns it off.
    """

    name = "fedgroup"

    pretrain_steps: int = checked(50, at_least(1))
    pretrain_clients: int = checked(20, at_least(1))
    inter_group_rate: float = checked(0.0, at_least(0))
    state: FedGroupState = field(init=False)

    @classmethod
    def rounds_of_equal_steps(cls, config: RunConfig) -> int:
        """``num-server-rounds`` minus the cost of the cold start."""
        return config.rounds_after_one_of_all()

    def initial(self) -> FedGroupState:
        """No groups yet."""
        return FedGroupState()

    def prepare_round(self, clients: list[int], exchange: Exchange) -> None:
        """The cold start, before the first round; it is repeated until it brings a reply."""
        state, clusters = self.state, self.clusters
        if clusters:
            return
        generator = numpy_generator(self.seed, "cold-start", self.server_round)
        chosen = random_cohort(clients, self.pretrain_clients * self.num_clusters, generator)
        state.origin = self.current
        replies = self._pretrain(chosen, exchange)
        # An update of zero has no direction.
        replies = [r for r in replies if squared_distance(r.state, state.origin) > 0]
        if replies:
            gram = gram_matrix([reply.state for reply in replies], state.origin)
            cosines = decomposed_cosines(gram, self.num_clusters)
            groups = clusters.assign(replies, k_means(cosines, self.num_clusters, self.seed))
            clusters.models = [mean_of(self, group) for group in groups]
            state.directions = [difference(model, state.origin) for model in clusters.models]

    def prepare_cohort(self, cohort: list[int], exchange: Exchange) -> None:
        """Assign a group to the clients of the cohort that have none."""
        newcomers = [client for client in cohort if client not in self.clusters.of]
        if newcomers and self.clusters:
            self._place(self._pretrain(newcomers, exchange))

    def advance(self, replies: list[ClientReply]) -> Update:
        """FedAvg in every group; then the aggregation between groups."""
        clusters = self.clusters
        with Timer() as timer:
            if clusters:
                # A client whose cold start failed is placed by its trained model.
                self._place([r for r in replies if r.client not in clusters.of])
        update = clusters.advance(self, replies, seconds={"infer": timer.seconds})
        if self.inter_group_rate > 0 and len(clusters.models) > 1:
            clusters.models = self.mixed_groups()
            return dataclasses.replace(update, model=mean_of(self, clusters.models))
        return update

    def mixed_groups(self) -> list[State]:
        """The groups' models after the aggregation between groups."""
        with one_thread():
            norms = [inner_product(model, model) ** 0.5 for model in self.clusters.models]
        rates = [self.inter_group_rate / max(norm, 1e-300) for norm in norms]
        mixed = []
        for group in range(len(rates)):
            parts = torch.tensor(rates, dtype=torch.float64)
            parts[group] = 1.0
            mixed.append(self.fuse(self.clusters.models, parts / parts.sum()))
        return mixed

    def _pretrain(self, clients: list[int], exchange: Exchange) -> list[ClientReply]:
        steps = {protocol.MAX_STEPS: self.pretrain_steps}
        return exchange(clients, self.state.origin, {protocol.PHASE: "cold-start", **steps})

    def _place(self, replies: list[ClientReply]) -> None:
        """Newcomers join the group with the direction nearest to their update's."""
        for reply in replies:
            update = difference(reply.state, self.state.origin)
            cosines = [
                inner_product(update, direction)
                / max(inner_product(direction, direction) ** 0.5, 1e-300)
                for direction in self.state.directions
            ]
            self.clusters.of[reply.client] = cosines.index(max(cosines))

    def settings(self) -> Iterable[str]:
        """Groups and cold start."""
        yield (
            f"FedGroup: {self.num_clusters} groups, cold start of {self.pretrain_steps} steps, "
            f"inter-group rate {self.inter_group_rate:g}"
        )
