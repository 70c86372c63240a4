# SPDX-License-Identifier: Apache-2.0
"""FedAvg (McMahan et al. 2017) on the shared base: the control for every comparison."""

from __future__ import annotations

import torch
from torch import Tensor

from fedfusion_flwr.fusion import example_weights
from fedfusion_flwr.strategies.base import BaseStrategy
from fedfusion_flwr.strategies.replies import ClientReply


class FedAvg(BaseStrategy):
    """Weights clients by their examples: p_k = n_k / sum_j n_j over this round's clients."""

    def client_weights(self, replies: list[ClientReply]) -> Tensor:
        """Example weights (K,)."""
        return example_weights(torch.tensor([reply.num_examples for reply in replies]))
