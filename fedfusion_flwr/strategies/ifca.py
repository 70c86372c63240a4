# SPDX-License-Identifier: Apache-2.0
"""IFCA (Ghosh et al., NeurIPS 2020, "An efficient framework for clustered federated learning",
arXiv 2006.04088), with model averaging.

Round t, models theta_1 .. theta_k on the server, cohort S_t:
  1. every client of S_t is sent all k models and picks j = argmin_j F_i(theta_j), its training loss
  2. it trains from theta_j and returns j and its model
  3. theta_j <- example-weighted mean of the models of those who picked j; the others stay

Models must start different, and even then one of them often wins every client at once. So in the
first rounds each model is trained by a fixed random share of the clients, as the authors do for
FEMNIST.
"""

from __future__ import annotations

from collections.abc import Mapping
from logging import INFO
from typing import Any

from flwr.common.logger import log

from fedfusion_flwr import protocol
from fedfusion_flwr.federation.conversation import Setting
from fedfusion_flwr.federation.engine import Exchange
from fedfusion_flwr.federation.replies import BadReply, ClientReply
from fedfusion_flwr.federation.round import State
from fedfusion_flwr.randomness import numpy_generator
from fedfusion_flwr.strategies.multi import MultiModelStrategy


class IFCA(MultiModelStrategy):
    """Clients choose among the models by their training loss.

    Parameters
    ----------
    warmup_rounds : int
        First rounds, in which a fixed random division says who trains which model.
    **base
        Arguments of `MultiModelStrategy`; more than one cluster needs ``initial_state``.
    """

    def __init__(self, *, warmup_rounds: int = 3, **base: Any) -> None:
        super().__init__(**base)
        self.warmup_rounds = warmup_rounds
        self._packed: State = {}

    @property
    def warms_up(self) -> bool:
        """Whether the division, not the clients, says who trains which model."""
        return self.num_clusters > 1 and self.server_round <= self.warmup_rounds

    def prepare_round(self, clients: list[int], exchange: Exchange) -> None:
        """Initialize the models; pack them for all clients of the round."""
        self.cluster_models = self.cluster_models or self.distinct_models()
        self._packed = protocol.pack_states(self.models())

    def sent_to(self, client: int) -> State:
        """All models; in the warm-up the one that the division says."""
        if self.warms_up:
            return self.cluster_models[self._random_cluster(client)]
        return self._packed

    def expected_from(self, client: int, metrics: Mapping[str, float]) -> State:
        """The model that the client says it chose; a reply that names none of ours is refused."""
        if self.warms_up:
            return super().expected_from(client, metrics)
        count = len(self.cluster_models)
        choice = metrics.get(protocol.CLUSTER, -1)
        if choice not in range(count):
            raise BadReply("cluster", f"metric 'cluster' names none of models 0 to {count - 1}")
        return self.cluster_models[int(choice)]

    def train_settings(self, client: int) -> dict[str, Setting]:
        """Tell how many models were sent."""
        return {} if self.warms_up else {protocol.NUM_MODELS: len(self.cluster_models)}

    def assign(self, replies: list[ClientReply]) -> dict[int, int]:
        """The clients' own choices; in the warm-up the division."""
        if self.warms_up:
            return {reply.client: self._random_cluster(reply.client) for reply in replies}
        return {reply.client: int(reply.metrics[protocol.CLUSTER]) for reply in replies}

    def personal_model(self, client: int) -> State:
        """All models: here too the client picks by its training loss."""
        return self._packed

    def prepare_evaluation(self) -> None:
        """Pack the models of after the round."""
        self._packed = protocol.pack_states(self.models())

    def evaluate_settings(self, client: int) -> dict[str, Setting]:
        """Tell how many models were sent."""
        return {protocol.NUM_MODELS: len(self.cluster_models)}

    def _random_cluster(self, client: int) -> int:
        return int(numpy_generator(self.seed, "warm-up", client).integers(self.num_clusters))

    def summary(self) -> None:
        """Log the strategy's settings at the start of a run."""
        log(
            INFO,
            "\t├──> IFCA: %d models, %d rounds of warm-up by a fixed random division",
            *(self.num_clusters, self.warmup_rounds if self.num_clusters > 1 else 0),
        )
        super().summary()
