# SPDX-License-Identifier: Apache-2.0
"""FedBN (Li et al. 2021, "FedBN: federated learning on non-IID features via local batch
normalization", arXiv 2102.07623).

Round t, cohort S_t:
  1. every client k in S_t is sent w_t with the normalization layers that it last returned
  2. all other entries are averaged as in FedAvg; normalization layers stay the clients' own

Clients keep no state between rounds here: the server stores each client's normalization layers and
sends them back. The global model holds their average, which FedBN itself does not define; a client
seen for the first time starts from it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from fedfusion_flwr.federation.replies import ClientReply, weights_by_examples
from fedfusion_flwr.federation.round import State, Update
from fedfusion_flwr.federation.strategy import FederatedStrategy
from fedfusion_flwr.fusion.statistics import batchnorm_prefixes


@dataclass
class FedBNState:
    """The normalization layers that each client last returned."""

    normalization_of: dict[int, State] = field(default_factory=dict)


class FedBN(FederatedStrategy):
    """FedAvg in which every client keeps its own BatchNorm layers."""

    name = "fedbn"
    state: FedBNState

    def initial(self) -> FedBNState:
        """No client has returned anything yet."""
        return FedBNState()

    def sent_to(self, client: int) -> State:
        """The global model with the client's own normalization layers."""
        return self._with_own(client, self.current)

    def personal_model(self, client: int) -> State:
        """The served model with the client's own normalization layers."""
        return self._with_own(client, self.served)

    def advance(self, replies: list[ClientReply]) -> Update:
        """FedAvg; then store every client's normalization layers, if the round counts."""
        update = self.weighted_update(replies, weights_by_examples(replies))
        prefixes = tuple(batchnorm_prefixes(self.current))
        for reply in replies:
            # Copies: a view would keep the whole reply in memory.
            self.state.normalization_of[reply.client] = {
                key: value.clone() for key, value in reply.state.items() if key.startswith(prefixes)
            }
        return update

    def _with_own(self, client: int, state: State) -> State:
        own = self.state.normalization_of.get(client)
        return {**state, **own} if own else state

    def settings(self) -> Iterable[str]:
        """Where the layers are kept."""
        return ["FedBN: each client's own BatchNorm layers, kept by the server"]
