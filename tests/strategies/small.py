# SPDX-License-Identifier: Apache-2.0
"""Real training in milliseconds: small images and networks behind the package's own client."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from client_app import app
from fedfusion_flwr import RunConfig, protocol
from fedfusion_flwr.data import data_for
from fedfusion_flwr.data.dataset import FederatedData
from fedfusion_flwr.data.sources import SOURCES
from fedfusion_flwr.federation.in_process_grid import InProcessGrid
from fedfusion_flwr.federation.round import State
from fedfusion_flwr.federation.strategy import FederatedStrategy
from fedfusion_flwr.models import MODELS, ModelEntry, model_for
from fedfusion_flwr.strategies import build_strategy
from tests.support import Outcome, Recorder

CLIENTS = 6
CLASSES = 4


def images(_options: object) -> FederatedData:
    """Four noisy patterns of 8 x 8 pixels, 40 training examples each."""
    generator = torch.Generator().manual_seed(0)
    patterns = torch.randn(CLASSES, 1, 8, 8, generator=generator)

    def drawn(count: int) -> tuple[torch.Tensor, torch.Tensor]:
        y = torch.arange(CLASSES).repeat_interleave(count)
        return patterns[y] + torch.randn(len(y), 1, 8, 8, generator=generator), y

    (x, y), (x_test, y_test) = drawn(40), drawn(10)
    return FederatedData("small", x, y, x_test, y_test, num_classes=CLASSES)


def batchnorm_network(_shape: object) -> nn.Module:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(64, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Linear(12, CLASSES)
    )


def plain_network(_shape: object) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 12), nn.ReLU(), nn.Linear(12, CLASSES))


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the fixture ``small`` does."""
    monkeypatch.setitem(SOURCES, "npz", images)
    monkeypatch.setitem(MODELS, "lenet", ModelEntry(batchnorm_network, 8))
    monkeypatch.setitem(MODELS, "resnet18", ModelEntry(plain_network, 8))


def small_config(**settings: Any) -> RunConfig:
    """Keys with underscores; defaults for six clients with Dirichlet labels."""
    defaults: dict[str, Any] = {
        "dataset": "npz",
        "data_root": "small",
        "partition": "dirichlet",
        "dirichlet_alpha": 1.0,
        "min_partition_size": 6,
        "num_clients": CLIENTS,
        "batch_size": 8,
        "num_server_rounds": 3,
        "server_momentum": 0.0,
        "average_decay": 0.0,
        "fraction_evaluate": 0.0,
    }
    values = defaults | settings
    return RunConfig.from_run_config({k.replace("_", "-"): v for k, v in values.items()})


def initial_model(config: RunConfig, number: int = 0) -> State:
    return model_for(config, data_for(config), number).state_dict()


def train_for_real(
    config: RunConfig, *, start: State | None = None, strategy: FederatedStrategy | None = None
) -> Outcome:
    """A run in this process through the package's ClientApp; replies arrive in random order."""
    recorder = Recorder()
    if strategy is None:
        strategy = build_strategy(config, [], lambda number: initial_model(config, number))
    strategy.callbacks.append(recorder)
    grid = InProcessGrid(app, config.num_clients, config.to_run_config(), shuffle_replies=True)
    arrays = protocol.record_from_state(start or initial_model(config))
    result = strategy.start(grid, arrays, config.num_server_rounds)
    return Outcome(result, strategy, recorder.reports)
