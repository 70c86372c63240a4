# SPDX-License-Identifier: Apache-2.0
"""The strategies, one file an algorithm, and the registry that builds them by name."""

from fedfusion_flwr.federation.engine import BaseStrategy, KeepOldModel, RunStopped
from fedfusion_flwr.federation.roster import NotEnoughNodes
from fedfusion_flwr.strategies.fedavg import FedAvg, FedAvgM
from fedfusion_flwr.strategies.fedbn import FedBN
from fedfusion_flwr.strategies.fedcluster import FedCluster
from fedfusion_flwr.strategies.fedcluster_cycling import FedClusterCycling
from fedfusion_flwr.strategies.fedfusion import FedFusion
from fedfusion_flwr.strategies.fedgroup import FedGroup
from fedfusion_flwr.strategies.fedma import FedMA
from fedfusion_flwr.strategies.fedprox import FedProx
from fedfusion_flwr.strategies.fesem import FeSEM
from fedfusion_flwr.strategies.fit import check_fits
from fedfusion_flwr.strategies.ifca import IFCA
from fedfusion_flwr.strategies.multi import MultiModelStrategy
from fedfusion_flwr.strategies.registry import REGISTRY, StrategyEntry, build_strategy
from fedfusion_flwr.strategies.single import SingleModelStrategy

__all__ = [
    "IFCA",
    "REGISTRY",
    "BaseStrategy",
    "FeSEM",
    "FedAvg",
    "FedAvgM",
    "FedBN",
    "FedCluster",
    "FedClusterCycling",
    "FedFusion",
    "FedGroup",
    "FedMA",
    "FedProx",
    "KeepOldModel",
    "MultiModelStrategy",
    "NotEnoughNodes",
    "RunStopped",
    "SingleModelStrategy",
    "StrategyEntry",
    "build_strategy",
    "check_fits",
]
