# SPDX-License-Identifier: Apache-2.0
"""FedProx (Li et al. 2020, "Federated optimization in heterogeneous networks", arXiv 1812.06127).

Round t, cohort S_t:
  1. every client k in S_t minimizes F_k(w) + (mu / 2) ||w - w_t||^2 from w_t on;
     the norm runs over all trained parameters
  2. w_t+1 = sum_k n_k w_k / sum_k n_k, as FedAvg
mu = 0 is FedAvg, bit for bit.
"""

from __future__ import annotations

from logging import INFO
from typing import Any

from flwr.common.logger import log

from fedfusion_flwr import protocol
from fedfusion_flwr.federation.conversation import Setting
from fedfusion_flwr.strategies.fedavg import FedAvg


class FedProx(FedAvg):
    """FedAvg whose clients stay near the received model.

    Parameters
    ----------
    proximal_mu : float
        mu, at least 0. Plain SGD is stable while learning rate * (curvature + mu) < 2.
    **base
        Arguments of `SingleModelStrategy`.
    """

    def __init__(self, *, proximal_mu: float = 0.01, **base: Any) -> None:
        super().__init__(**base)
        self.proximal_mu = proximal_mu

    def train_settings(self, client: int) -> dict[str, Setting]:
        """Tell mu to the client, who adds mu (w - w_t) to every gradient."""
        return {protocol.PROXIMAL_MU: self.proximal_mu}

    def summary(self) -> None:
        """Log the strategy's settings at the start of a run."""
        log(INFO, "\t├──> FedProx: mu %g", self.proximal_mu)
        super().summary()
