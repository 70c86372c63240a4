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
from torch import Tensor

from fedfusion_flwr import protocol
from fedfusion_flwr.config import RunConfig
from fedfusion_flwr.config_rules import at_least, checked
from fedfusion_flwr.federation.bookkeeping import Timer
from fedfusion_flwr.federation.bounds import difference, inner_product
from fedfusion_flwr.federation.replies import ClientReply
from fedfusion_flwr.federation.round import Exchange, Setting, State, Update
from fedfusion_flwr.federation.sampling import random_cohort
from fedfusion_flwr.federation.strategy import FederatedStrategy
from fedfusion_flwr.fusion.threads import one_thread
from fedfusion_flwr.randomness import numpy_generator
from fedfusion_flwr.strategies.clusters import Clusters, mean_of
from fedfusion_flwr.strategies.geometry import gram_matrix, k_means, principal_coordinates


@dataclass
class FedGroupState:
    """The groups, the model that updates start from, and each group's mean first update."""

    clusters: Clusters = field(default_factory=Clusters)
    origin: State = field(default_factory=dict)
    directions: list[State] = field(default_factory=list)


@dataclass(kw_only=True, eq=False, repr=False)
class FedGroup(FederatedStrategy):
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
    single_model = False

    num_clusters: int = checked(5, at_least(1))
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
        if self.state.clusters:
            return
        generator = numpy_generator(self.seed, "cold-start", self.server_round)
        chosen = random_cohort(clients, self.pretrain_clients * self.num_clusters, generator)
        self.state.origin = self.current
        replies = [r for r in self._pretrain(chosen, exchange) if self._moved(r)]
        if not replies:
            return
        gram = gram_matrix([reply.state for reply in replies], self.state.origin)
        cosines = decomposed_cosines(gram, self.num_clusters)
        labels = k_means(cosines, self.num_clusters, self.seed)
        self.state.clusters.of = {r.client: int(j) for r, j in zip(replies, labels, strict=True)}
        for group in range(int(labels.max()) + 1):
            members = [r.state for r in replies if self.state.clusters.of[r.client] == group]
            model = mean_of(self, members)
            self.state.clusters.models.append(model)
            self.state.directions.append(difference(model, self.state.origin))

    def prepare_cohort(self, cohort: list[int], exchange: Exchange) -> None:
        """Assign a group to the clients of the cohort that have none."""
        newcomers = [client for client in cohort if client not in self.state.clusters.of]
        if newcomers and self.state.clusters:
            for reply in self._pretrain(newcomers, exchange):
                self.state.clusters.of[reply.client] = self._nearest(reply)

    def sent_to(self, client: int) -> State:
        """The model of the client's group; the global one while it has none."""
        return self.state.clusters.model_of(client, self.current)

    def advance(self, replies: list[ClientReply]) -> Update:
        """FedAvg in every group; then the aggregation between groups."""
        clusters = self.state.clusters
        with Timer() as timer:
            if clusters:
                # A client whose cold start failed is placed by its trained model.
                placed = {
                    r.client: self._nearest(r) for r in replies if r.client not in clusters.of
                }
                clusters.of |= placed
        update = clusters.advance(self, replies, seconds={"infer": timer.seconds})
        if self.inter_group_rate > 0 and len(clusters.models) > 1:
            clusters.models = self.mixed_groups()
            return dataclasses.replace(update, model=mean_of(self, clusters.models))
        return update

    def personal_model(self, client: int) -> State:
        """The model of the client's group; the served one while it has none."""
        return self.state.clusters.model_of(client, self.served)

    def models(self) -> dict[str, State]:
        """The groups' models, ``c0``, ``c1``, ..."""
        return self.state.clusters.named()

    def mixed_groups(self) -> list[State]:
        """The groups' models after the aggregation between groups."""
        with one_thread():
            norms = [inner_product(model, model) ** 0.5 for model in self.state.clusters.models]
        rates = [self.inter_group_rate / max(norm, 1e-300) for norm in norms]
        mixed = []
        for group in range(len(rates)):
            parts = torch.tensor(rates, dtype=torch.float64)
            parts[group] = 1.0
            mixed.append(self.fuse(self.state.clusters.models, parts / parts.sum()))
        return mixed

    def _pretrain(self, clients: list[int], exchange: Exchange) -> list[ClientReply]:
        settings: dict[str, Setting] = {
            protocol.PHASE: "cold-start",
            protocol.MAX_STEPS: self.pretrain_steps,
        }
        return exchange(clients, self.state.origin, settings)

    def _moved(self, reply: ClientReply) -> bool:
        """Whether the update has a direction; an update of zero has none."""
        update = difference(reply.state, self.state.origin)
        return inner_product(update, update) > 0

    def _nearest(self, reply: ClientReply) -> int:
        update = difference(reply.state, self.state.origin)
        cosines = [
            inner_product(update, direction)
            / max(inner_product(direction, direction) ** 0.5, 1e-300)
            for direction in self.state.directions
        ]
        return cosines.index(max(cosines))

    def settings(self) -> Iterable[str]:
        """Groups and cold start."""
        yield (
            f"FedGroup: {self.num_clusters} groups, cold start of {self.pretrain_steps} steps, "
            f"inter-group rate {self.inter_group_rate:g}"
        )


def decomposed_cosines(gram: Tensor, dimensions: int) -> Tensor:
    """E, (K, dimensions): cosine of every update with the leading singular directions.

    With eigenpairs (lambda_k, u_k) of the updates' Gram matrix G, E_ik = sqrt(lambda_k) u_ik /
    sqrt(G_ii): the singular vectors themselves are never needed. Signs of columns are arbitrary.
    """
    return principal_coordinates(gram, dimensions) / gram.diagonal().sqrt().unsqueeze(1)
