# SPDX-License-Identifier: Apache-2.0
"""The workload of the benchmarks on pfl-research: FedAvg, one process with as many threads.

Needs the extra ``benchmarks``. Bfloat16 is its own ``amp_dtype``; batches are cut in the order of
the examples, as its data sets do.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from pfl.aggregate.simulate import SimulatedBackend
from pfl.aggregate.weighting import WeightByDatapoints
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.callback.base import TrainingProcessCallback
from pfl.data.federated_dataset import FederatedDataset
from pfl.data.sampling import get_user_sampler
from pfl.hyperparam import NNTrainHyperParams
from pfl.metrics import Metrics, Weighted
from pfl.model.pytorch import PyTorchModel
from torch import Tensor
from torch.nn import functional as F

from benchmarks.workload import Workload
from fedfusion_flwr.config import RunConfig
from fedfusion_flwr.data import local_data
from fedfusion_flwr.models.lenet import LeNet


class Network(LeNet):
    """Says what pfl-research asks a model for; it evaluates in the first round only."""

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        self.train()
        return F.cross_entropy(self(x), y)

    @torch.no_grad()
    def metrics(self, x: Tensor, y: Tensor) -> dict[str, Weighted]:
        self.eval()
        return {"loss": Weighted(float(F.cross_entropy(self(x), y, reduction="sum")), len(x))}


class RoundClock(TrainingProcessCallback[PyTorchModel]):
    """Notes when a round is over, which is when the next one begins."""

    def __init__(self) -> None:
        self.starts: list[float] = []

    def on_train_begin(self, *, model: PyTorchModel) -> Metrics:
        self.starts.append(time.perf_counter())
        return Metrics()

    def after_central_iteration(
        self, aggregate_metrics: Metrics, model: PyTorchModel, *, central_iteration: int
    ) -> tuple[bool, Metrics]:
        self.starts.append(time.perf_counter())
        return False, Metrics()


def round_starts(work: Workload, folder: Path) -> list[float]:
    """Run it in this process."""
    torch.set_num_threads(work.actors)
    config = RunConfig.from_run_config(work.config(folder))
    shares = {}
    for client in range(work.clients):
        data = local_data(config, client)
        shares[str(client)] = [data.x, data.y]
    network = Network((1, work.side, work.side), 10)

    def optimizer(parameters: Any, lr: float) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters, lr=lr, momentum=0.9, weight_decay=1e-4)

    model = PyTorchModel(
        network,
        local_optimizer_create=optimizer,
        central_optimizer=torch.optim.SGD(network.parameters(), lr=1.0),
        amp_dtype=torch.bfloat16 if work.precision == "bf16" else None,
    )
    users = FederatedDataset.from_slices(shares, get_user_sampler("minimize_reuse", list(shares)))
    clock = RoundClock()
    FederatedAveraging().run(
        NNAlgorithmParams(
            central_num_iterations=work.rounds,
            evaluation_frequency=work.rounds + 1,
            train_cohort_size=work.clients,
            val_cohort_size=0,
        ),
        SimulatedBackend(
            training_data=users, val_data=users, postprocessors=[WeightByDatapoints()]
        ),
        model,
        NNTrainHyperParams(
            local_num_epochs=1, local_learning_rate=0.02, local_batch_size=work.batch
        ),
        callbacks=[clock],
    )
    return clock.starts[: work.rounds]
