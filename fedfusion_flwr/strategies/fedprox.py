# SPDX-License-Identifier: Apache-2.0
"""FedProx (Li et al. 2020, "Federated optimization in heterogeneous networks", arXiv 1812.06127).

Round t, cohort S_t:
  1. every client k in S_t minimizes F_k(w) + (mu / 2) ||w - w_t||^2, starting from w_t;
     the norm runs over all trained parameters
  2. w_t+1 = sum_k n_k w_k / sum_k n_k, as FedAvg
mu = 0 is FedAvg, bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from fedfusion_flwr import protocol
from fedfusion_flwr.config_rules import at_least, checked
from fedfusion_flwr.federation.replies import ClientReply, weights_by_examples
from fedfusion_flwr.federation.round import Setting, Update
from fedfusion_flwr.federation.strategy import FederatedStrategy


@dataclass(kw_only=True, eq=False, repr=False)
class FedProx(FederatedStrategy):
    """FedAvg whose clients stay near the received model.

    Parameters
    ----------
    proximal_mu : float
        mu, at least 0. Plain SGD is stable while learning rate * (curvature + mu) < 2.
    """

    name = "fedprox"

    proximal_mu: float = checked(0.01, at_least(0))

    def train_settings(self, client: int) -> dict[str, Setting]:
        """Send mu to the client, which adds mu (w - w_t) to every gradient."""
        return {protocol.PROXIMAL_MU: self.proximal_mu}

    def advance(self, replies: list[ClientReply]) -> Update:
        """The example-weighted mean."""
        return self.weighted_update(replies, weights_by_examples(replies))

    def settings(self) -> Iterable[str]:
        """The weight mu."""
        return [f"FedProx: mu {self.proximal_mu:g}"]
