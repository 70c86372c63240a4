# SPDX-License-Identifier: Apache-2.0
"""FedAvg, FedAvgM and Fed-GN: the controls for every comparison.

McMahan et al. 2017, "Communication-efficient learning of deep networks from decentralized data";
Hsu et al. 2019, "Measuring the effects of non-identical data distribution";
Hsieh et al. 2020, "The non-IID data quagmire of decentralized machine learning".

Round t, cohort S_t:
  1. every client k in S_t trains w_t on its data and returns w_k with its example count n_k
  2. FedAvg:   w_t+1 = sum_k n_k w_k / sum_k n_k
     FedAvgM:  v <- momentum v + (sum_k p_k w_k - w_t);  w_t+1 = w_t + rate v
     Fed-GN:   as FedAvg, on a model whose BatchNorm layers became group norm
"""

from __future__ import annotations

from logging import WARNING

from flwr.common.logger import log
from torch import Tensor, nn

from fedfusion_flwr.config import RunConfig
from fedfusion_flwr.federation.replies import ClientReply, weights_by_examples
from fedfusion_flwr.federation.round import Update
from fedfusion_flwr.federation.strategy import FederatedStrategy
from fedfusion_flwr.fusion.statistics import normalization_layers


class FedAvg(FederatedStrategy):
    """Weights clients by their examples: p_k = n_k / sum_j n_j over this round's clients."""

    name = "fedavg"

    def advance(self, replies: list[ClientReply]) -> Update:
        """The example-weighted mean."""
        return self.weighted_update(replies, weights_by_examples(replies))


class FedAvgM(FederatedStrategy):
    """FedAvg with server momentum and served average: the control for FedFusion's server step."""

    name = "fedavgm"
    server_step = True

    def advance(self, replies: list[ClientReply]) -> Update:
        """A step towards the example-weighted mean."""
        return self.weighted_update(replies, weights_by_examples(replies))


class FedGN(FederatedStrategy):
    """FedAvg on a model with group norm, which has no statistics to average."""

    name = "fed-gn"

    def advance(self, replies: list[ClientReply]) -> Update:
        """The example-weighted mean."""
        return self.weighted_update(replies, weights_by_examples(replies))

    @classmethod
    def check_model(cls, config: RunConfig, model: nn.Module, examples: Tensor) -> None:
        """Warn if the model has no layer to convert."""
        if next(normalization_layers(model), None) is None:
            log(
                WARNING,
                "model = %r with normalization = %r has no normalization layer to become group "
                "norm: fed-gn is fedavg here",
                *(config.model, config.model_normalization),
            )
