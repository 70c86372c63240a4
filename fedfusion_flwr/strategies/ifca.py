# SPDX-License-Identifier: Apache-2.0
"""IFCA (Ghosh et al., NeurIPS 2020, "An efficient framework for clustered federated learning",
arXiv 2006.04088), with model averaging.

Round t, models theta_1 .. theta_k on the server, cohort S_t:
  1. every client of S_t is sent all k models and picks j = argmin_j F_i(theta_j), its training loss
  2. it trains from theta_j and returns j and its model
  3. theta_j <- example-weighted mean of the models of those who picked j; the others stay

Models must start out different, and even then one of them often wins all clients at once. So in the
first rounds each model is trained by a fixed random share of the clients, as the authors do for
FEMNIST.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from fedfusion_flwr import protocol
from fedfusion_flwr.config_rules import at_least, checked
from fedfusion_flwr.federation.replies import BadReply, ClientReply
from fedfusion_flwr.federation.round import Exchange, Setting, State, Update
from fedfusion_flwr.randomness import numpy_generator
from fedfusion_flwr.strategies.clusters import ClusteredStrategy, InitialState, distinct_models


@dataclass(kw_only=True, eq=False, repr=False)
class IFCA(ClusteredStrategy):
    """Clients choose among the models by their training loss.

    Parameters
    ----------
    num_clusters : int
        Models to choose among.
    warmup_rounds : int
        First rounds, in which a fixed random division assigns models to clients.
    initial_state : Callable[[int], State] or None
        Makes different untrained models; needed for more than one cluster.
    """

    name = "ifca"

    warmup_rounds: int = checked(3, at_least(0))
    initial_state: InitialState | None = None

    @property
    def warms_up(self) -> bool:
        """Whether the fixed division chooses each client's model, and not the client."""
        return self.num_clusters > 1 and self.server_round <= self.warmup_rounds

    def prepare_round(self, clients: list[int], exchange: Exchange) -> None:
        """Initialize the models; pack them for all clients of the round."""
        if not self.clusters:
            self.clusters.models = distinct_models(self, self.num_clusters, self.initial_state)
        self._packed = protocol.pack_states(self.models())

    def sent_to(self, client: int) -> State:
        """All models; in the warm-up, the one assigned to the client."""
        if self.warms_up:
            return self.clusters.models[self._random_cluster(client)]
        return self._packed

    def expected_from(self, client: int, metrics: Mapping[str, float]) -> State:
        """The model that the client says it chose; refuses a reply without a valid choice."""
        if self.warms_up:
            return super().expected_from(client, metrics)
        models = self.clusters.models
        choice = metrics.get(protocol.CLUSTER, -1)
        if choice not in range(len(models)):
            raise BadReply(
                "cluster", f"metric 'cluster' names none of models 0 to {len(models) - 1}"
            )
        return models[int(choice)]

    def train_settings(self, client: int) -> dict[str, Setting]:
        """The number of models that are sent."""
        return {} if self.warms_up else self.evaluate_settings(client)

    def advance(self, replies: list[ClientReply]) -> Update:
        """Fuse by the clients' choices; in the warm-up, by the fixed division."""
        for reply in replies:
            self.clusters.of[reply.client] = (
                self._random_cluster(reply.client)
                if self.warms_up
                else int(reply.metrics[protocol.CLUSTER])
            )
        return super().advance(replies)

    def prepare_evaluation(self) -> None:
        """Pack the updated models."""
        self._packed = protocol.pack_states(self.models())

    def personal_model(self, client: int) -> State:
        """All models: as in training, the client picks one by its training loss."""
        return self._packed

    def evaluate_settings(self, client: int) -> dict[str, Setting]:
        """The number of models that are sent."""
        return {protocol.NUM_MODELS: len(self.clusters.models)}

    def _random_cluster(self, client: int) -> int:
        return int(numpy_generator(self.seed, "warm-up", client).integers(self.num_clusters))

    def settings(self) -> Iterable[str]:
        """Models and warm-up."""
        warmup = self.warmup_rounds if self.num_clusters > 1 else 0
        yield (
            f"IFCA: {self.num_clusters} models, {warmup} rounds of warm-up by a fixed random "
            "division"
        )
