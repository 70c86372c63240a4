# SPDX-License-Identifier: Apache-2.0
"""Strategies with one global model: weights for the clients, one fusion, one server step."""

from __future__ import annotations

from logging import INFO
from typing import Any

import torch
from flwr.common.logger import log
from torch import Tensor

from fedfusion_flwr.federation.bookkeeping import add
from fedfusion_flwr.federation.bounds import UpdateBound
from fedfusion_flwr.federation.engine import BaseStrategy, KeepOldModel
from fedfusion_flwr.federation.replies import ClientReply
from fedfusion_flwr.federation.round import State
from fedfusion_flwr.fusion import ServerStep, cap_weights, example_weights
from fedfusion_flwr.fusion.threads import one_thread


class SingleModelStrategy(BaseStrategy):
    """w <- step(w, sum_k p_k w_k); FedAvg unless `client_weights` is overridden.

    Parameters
    ----------
    server_learning_rate, server_momentum : float
        The aggregate is a pseudo-gradient; 1 and 0 take the aggregate as it is.
    max_client_weight : float
        Upper limit of one client's weight in the global model; 1 is no limit.
    **base
        Arguments of `BaseStrategy`.
    """

    STATE = (*BaseStrategy.STATE, "step")

    def __init__(
        self,
        *,
        server_learning_rate: float = 1.0,
        server_momentum: float = 0.0,
        max_client_weight: float = 1.0,
        **base: Any,
    ) -> None:
        super().__init__(**base)
        self.step = ServerStep(server_learning_rate, server_momentum)
        self.max_client_weight = max_client_weight

    def client_weights(self, replies: list[ClientReply]) -> Tensor:
        """Weights p (K,), float64: what each model counts; non-negative, sums to 1."""
        return example_weights(torch.tensor([reply.num_examples for reply in replies]))

    def aggregate(self, replies: list[ClientReply], weights: Tensor) -> State:
        """The fused model, before the server step."""
        return self.fuse_states((reply.state for reply in replies), weights)

    def accepted(self, replies: list[ClientReply], weights: Tensor) -> None:
        """Take note that this round's aggregate became the new model."""

    def assignment_of(self, reply: ClientReply) -> list[float] | None:
        """The client's row of b for the report, where the strategy has one."""
        return None

    def advance(self, replies: list[ClientReply]) -> State:
        """Weigh, fuse and take the server step."""
        with one_thread():
            wanted = self.client_weights(replies)
            weights = cap_weights(wanted, self.max_client_weight)
        self._book_capped(replies, wanted)
        self._stopwatch.lap(self.report, "infer")
        aggregate = self.aggregate(replies, weights)
        problem = UpdateBound(self.current, self.max_update_ratio).objection(aggregate)
        if problem:
            raise KeepOldModel(f"of the fused model, {problem}")
        model = self.step(self.current, aggregate)
        self.accepted(replies, weights)
        self.report.clients = [
            reply.row(weight, self.assignment_of(reply))
            for reply, weight in zip(replies, weights.tolist(), strict=True)
        ] + self.report.clients
        entropy = -torch.xlogy(weights, weights).sum()
        self.report.metrics["weight-entropy"] = float(entropy)
        return model

    def _book_capped(self, replies: list[ClientReply], wanted: Tensor) -> None:
        for reply, weight in zip(replies, wanted.tolist(), strict=True):
            if weight > self.max_client_weight:
                add(self.report, "weights-capped", 1)
                log(
                    INFO,
                    "round %d: client %d (node %d): weight %.3g capped to %g",
                    *(self.server_round, reply.client, reply.node, weight, self.max_client_weight),
                )

    def summary(self) -> None:
        """Log the strategy's settings at the start of a run."""
        log(
            INFO,
            "\t├──> Server step: learning rate %g, momentum %g",
            self.step.learning_rate,
            self.step.momentum,
        )
        super().summary()
