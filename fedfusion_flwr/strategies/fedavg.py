# SPDX-License-Identifier: Apache-2.0
"""FedAvg and FedAvgM: the controls for every comparison.

McMahan et al. 2017, "Communication-efficient learning of deep networks from decentralized data";
Hsu et al. 2019, "Measuring the effects of non-identical data distribution".

Round t, cohort S_t:
  1. every client k in S_t trains w_t on its data and returns w_k with its example count n_k
  2. FedAvg:   w_t+1 = sum_k n_k w_k / sum_k n_k
     FedAvgM:  v <- momentum v + (sum_k p_k w_k - w_t);  w_t+1 = w_t + rate v
"""

from __future__ import annotations

from fedfusion_flwr.strategies.single import SingleModelStrategy


class FedAvg(SingleModelStrategy):
    """Weights clients by their examples: p_k = n_k / sum_j n_j over this round's clients."""


class FedAvgM(FedAvg):
    """FedAvg with server momentum and served average: the control for FedFusion's server step."""
