# SPDX-License-Identifier: Apache-2.0
"""The strategies, one file per algorithm, and the registry that builds them by name."""

from fedfusion_flwr.strategies.fedavg import FedAvg, FedAvgM, FedGN
from fedfusion_flwr.strategies.fedbn import FedBN
from fedfusion_flwr.strategies.fedcluster import FedCluster
from fedfusion_flwr.strategies.fedcluster_cycling import FedClusterCycling
from fedfusion_flwr.strategies.fedfusion import FedFusion
from fedfusion_flwr.strategies.fedgroup import FedGroup
from fedfusion_flwr.strategies.fedma import FedMA
from fedfusion_flwr.strategies.fedprox import FedProx
from fedfusion_flwr.strategies.fesem import FeSEM
from fedfusion_flwr.strategies.ifca import IFCA
from fedfusion_flwr.strategies.registry import (
    build_strategy,
    check_fits,
    keys_of,
    registry,
    strategy_class,
)

__all__ = [
    "IFCA",
    "FeSEM",
    "FedAvg",
    "FedAvgM",
    "FedBN",
    "FedCluster",
    "FedClusterCycling",
    "FedFusion",
    "FedGN",
    "FedGroup",
    "FedMA",
    "FedProx",
    "build_strategy",
    "check_fits",
    "keys_of",
    "registry",
    "strategy_class",
]
