# SPDX-License-Identifier: Apache-2.0
"""FedGroup (Duan et al. 2021, "FedGroup: efficient clustered federated learning via decomposed
data-driven measure", arXiv 2010.06870).

Cold start, once:
  1. alpha m clients train a few steps from w_0; their updates are D_i = w_i - w_0
  2. V: the m left singular directions of the updates (not centred); E_ik = cos(D_i, v_k)
  3. k-means with m clusters on the rows of E (EDC: Euclidean distance of decomposed cosines)
  4. group g: the uniform mean of its members' models; its direction, the mean of their updates
Newcomer, when first selected: trains those steps from w_0, joins argmin_g (1 - cos(D, D_g)) / 2.
Round: every group is a FedAvg of its own over its selected members; assignments never change.
Optionally: w_g <- (w_g + eta sum_{l != g} w_l / ||w_l||) / (1 + eta sum_{l != g} 1 / ||w_l||).
"""

from __future__ import annotations

from logging import INFO
from typing import Any

import torch
from flwr.common.logger import log
from torch import Tensor

from fedfusion_flwr import protocol
from fedfusion_flwr.federation.bounds import (
    difference,
    gram_matrix,
    inner_product,
    principal_coordinates,
)
from fedfusion_flwr.federation.conversation import Setting
from fedfusion_flwr.federation.engine import Exchange
from fedfusion_flwr.federation.replies import ClientReply
from fedfusion_flwr.federation.round import State
from fedfusion_flwr.federation.sampling import random_cohort
from fedfusion_flwr.fusion.threads import one_thread
from fedfusion_flwr.randomness import numpy_generator
from fedfusion_flwr.strategies.multi import MultiModelStrategy, k_means


class FedGroup(MultiModelStrategy):
    """Static groups by the directions of the clients' first updates.

    Parameters
    ----------
    pretrain_steps : int
        Gradient steps of the cold start, and of a newcomer.
    pretrain_clients : int
        alpha: clients per group that take part in the cold start.
    inter_group_rate : float
        eta_G of the aggregation between groups; 0 is none.
    **base
        Arguments of `MultiModelStrategy`.
    """

    STATE = (*MultiModelStrategy.STATE, "origin", "directions")

    def __init__(
        self,
        *,
        pretrain_steps: int = 50,
        pretrain_clients: int = 20,
        inter_group_rate: float = 0.0,
        **base: Any,
    ) -> None:
        super().__init__(**base)
        self.pretrain_steps = pretrain_steps
        self.pretrain_clients = pretrain_clients
        self.inter_group_rate = inter_group_rate
        self.origin: State = {}
        self.directions: list[State] = []

    def prepare_round(self, clients: list[int], exchange: Exchange) -> None:
        """The cold start, before the first round (and again while it brought no reply)."""
        if self.cluster_models:
            return
        generator = numpy_generator(self.seed, "cold-start", self.server_round)
        chosen = random_cohort(clients, self.pretrain_clients * self.num_clusters, generator)
        self.origin = self.current
        replies = [r for r in self._pretrain(chosen, exchange) if self._moved(r)]
        if not replies:
            return
        gram = gram_matrix([reply.state for reply in replies], self.origin)
        cosines = decomposed_cosines(gram, self.num_clusters)
        labels = k_means(cosines, self.num_clusters, self.seed)
        self.cluster_of = {r.client: int(j) for r, j in zip(replies, labels, strict=True)}
        for group in range(int(labels.max()) + 1):
            members = [r.state for r in replies if self.cluster_of[r.client] == group]
            model = self.mean_of(members)
            self.cluster_models.append(model)
            self.directions.append(difference(model, self.origin))

    def prepare_cohort(self, cohort: list[int], exchange: Exchange) -> None:
        """Give a group to those of the cohort that have none."""
        newcomers = [client for client in cohort if client not in self.cluster_of]
        if newcomers and self.cluster_models:
            for reply in self._pretrain(newcomers, exchange):
                self.cluster_of[reply.client] = self._nearest(reply)

    def advance(self, replies: list[ClientReply]) -> State:
        """FedAvg in every group; then, if asked, the aggregation between groups."""
        model = super().advance(replies)
        if self.inter_group_rate > 0 and len(self.cluster_models) > 1:
            self.cluster_models = self._mixed_groups()
            return self.global_model()
        return model

    def assign(self, replies: list[ClientReply]) -> dict[int, int]:
        """The groups, which never change; one whose cold start failed is placed by its model."""
        placed = {r.client: self._nearest(r) for r in replies if r.client not in self.cluster_of}
        return {reply.client: (self.cluster_of | placed)[reply.client] for reply in replies}

    def _pretrain(self, clients: list[int], exchange: Exchange) -> list[ClientReply]:
        settings: dict[str, Setting] = {
            protocol.PHASE: "cold-start",
            protocol.MAX_STEPS: self.pretrain_steps,
        }
        return exchange(clients, self.origin, settings)

    def _moved(self, reply: ClientReply) -> bool:
        """An update of zero has no direction."""
        update = difference(reply.state, self.origin)
        return inner_product(update, update) > 0

    def _nearest(self, reply: ClientReply) -> int:
        update = difference(reply.state, self.origin)
        cosines = [
            inner_product(update, direction)
            / max(inner_product(direction, direction) ** 0.5, 1e-300)
            for direction in self.directions
        ]
        return cosines.index(max(cosines))

    def _mixed_groups(self) -> list[State]:
        with one_thread():
            norms = [inner_product(model, model) ** 0.5 for model in self.cluster_models]
        rates = [self.inter_group_rate / max(norm, 1e-300) for norm in norms]
        mixed = []
        for group in range(len(rates)):
            parts = torch.tensor(rates, dtype=torch.float64)
            parts[group] = 1.0
            mixed.append(self.fuse_states(self.cluster_models, parts / parts.sum()))
        return mixed

    def summary(self) -> None:
        """Log the strategy's settings at the start of a run."""
        log(
            INFO,
            "\t├──> FedGroup: %d groups, cold start of %d steps, inter-group rate %g",
            *(self.num_clusters, self.pretrain_steps, self.inter_group_rate),
        )
        super().summary()


def decomposed_cosines(gram: Tensor, dimensions: int) -> Tensor:
    """E, (K, dimensions): cosine of every update with the leading singular directions of them all.

    With eigenpairs (lambda_k, u_k) of the updates' Gram matrix G, E_ik = sqrt(lambda_k) u_ik /
    sqrt(G_ii): the singular vectors themselves are never needed. Signs of columns are arbitrary.
    """
    return principal_coordinates(gram, dimensions) / gram.diagonal().sqrt().unsqueeze(1)
