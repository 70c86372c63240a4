# SPDX-License-Identifier: Apache-2.0
"""FedFusion for Flower: federated learning with data-agnostic distribution fusion."""

from fedfusion_flwr.calibration import calibrated_cross_entropy, label_log_prior
from fedfusion_flwr.config import ConfigError, RunConfig
from fedfusion_flwr.errors import FedFusionError
from fedfusion_flwr.federation.strategy import FederatedStrategy
from fedfusion_flwr.strategies import FedAvg, FedFusion

__version__ = "0.1.0"
__all__ = [
    "ConfigError",
    "FedAvg",
    "FedFusion",
    "FedFusionError",
    "FederatedStrategy",
    "RunConfig",
    "calibrated_cross_entropy",
    "label_log_prior",
]
