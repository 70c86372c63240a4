# SPDX-License-Identifier: Apache-2.0
"""The method, in torch and NumPy: imports neither Flower nor the rest of this package."""

from fedfusion_flwr.fusion.aggregation import (
    balanced_mixture,
    cap_weights,
    client_weights,
    component_coefficients,
    example_weights,
    inhabited,
    prune_assignments,
)
from fedfusion_flwr.fusion.inference import DistributionInference, FusionPosterior, InferenceError
from fedfusion_flwr.fusion.memory import StatisticsMemory
from fedfusion_flwr.fusion.server_step import ServedAverage, ServerStep
from fedfusion_flwr.fusion.state_dicts import fuse_state_dicts
from fedfusion_flwr.fusion.statistics import (
    NormalizationStatistics,
    StatisticsError,
    pooled_moments,
)

__all__ = [
    "DistributionInference",
    "FusionPosterior",
    "InferenceError",
    "NormalizationStatistics",
    "ServedAverage",
    "ServerStep",
    "StatisticsError",
    "StatisticsMemory",
    "balanced_mixture",
    "cap_weights",
    "client_weights",
    "component_coefficients",
    "example_weights",
    "fuse_state_dicts",
    "inhabited",
    "pooled_moments",
    "prune_assignments",
]
