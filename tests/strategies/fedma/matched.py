# SPDX-License-Identifier: Apache-2.0
"""FedMA over the tiny model, whose pass is two rounds; and small networks with random values."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from flwr.app import Context, Message
from torch import Tensor, nn

from fedfusion_flwr.federation.in_process_grid import InProcessGrid
from fedfusion_flwr.models.resize import fit_to_state
from fedfusion_flwr.randomness import torch_generator
from fedfusion_flwr.strategies import FedMA
from fedfusion_flwr.strategies.fedma.layers import PlainNetwork
from fedfusion_flwr.strategies.fedma.network import plain_network
from tests.support import (
    Outcome,
    Recorder,
    State,
    TamperingGrid,
    honest_state,
    initial_arrays,
    tiny_model,
)

HONEST = 5
NETWORK = plain_network(tiny_model(), "tiny", (2,))
OUT = "out.weight"
IMAGE = (2, 8, 8)
BUILDS = ("batchnorm", "bias", "instances", "one group")


def other_state(number: int) -> State:
    """An untrained tiny model of a number; its units lie far apart."""
    generator = torch_generator(0, "test", number)
    model = tiny_model()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(5 * torch.randn(parameter.shape, generator=generator))
    return model.state_dict()


def run_fedma(
    client: Callable[[Message, Context], Message],
    num_clients: int,
    *,
    rounds: int = 2,
    grid: InProcessGrid | None = None,
    **settings: Any,
) -> Outcome:
    recorder = Recorder()
    arguments = {"min_train_nodes": 1, "min_available_nodes": 1, "fraction_evaluate": 0} | settings
    strategy = FedMA(network=NETWORK, callbacks=[recorder], **arguments)
    grid = grid or TamperingGrid(client, num_clients)
    result = strategy.start(grid, initial_arrays(), num_rounds=rounds)
    return Outcome(result, strategy, recorder.reports)


def trained(received: State, partition: int, times: int = 1) -> State:
    for _ in range(times):
        received = honest_state(received, partition)
    return received


def small_cnn(kind: str, seed: int = 0) -> nn.Sequential:
    """Two convolutions, a flattened image and two fully connected layers; in eval mode."""

    def block(inputs: int, units: int) -> list[nn.Module]:
        conv = nn.Conv2d(inputs, units, 3, padding=1, bias=kind == "bias")
        norms: dict[str, list[nn.Module]] = {
            "batchnorm": [nn.BatchNorm2d(units)],
            "instances": [nn.GroupNorm(units, units)],
            "one group": [nn.GroupNorm(1, units)],
        }
        return [conv, *norms.get(kind, []), nn.ReLU(), nn.MaxPool2d(2)]

    head = [nn.Flatten(), nn.Linear(6 * 4, 7), nn.ReLU(), nn.Linear(7, 3)]
    model = nn.Sequential(*block(2, 5), *block(5, 6), *head)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, value in model.state_dict().items():
            if value.is_floating_point():
                noise = torch.randn(value.shape, generator=generator)
                value.copy_(noise.abs() + 0.5 if key.endswith("running_var") else 0.5 * noise)
    return model.eval()


def layers_of(model: nn.Module) -> PlainNetwork:
    return plain_network(model, "small", IMAGE)


def permuted(network: PlainNetwork, state: State, seed: int) -> tuple[State, list[np.ndarray]]:
    """The same function with its hidden units in a random order, and that order."""
    generator = np.random.default_rng(seed)
    order = [generator.permutation(layer.units) for layer in network.layers[:-1]]
    return network.take(state, order), order


def outputs(model: nn.Module, state: State, seed: int = 7) -> Tensor:
    """What the network of that state computes of random images."""
    fitted = copy.deepcopy(fit_to_state(model, state))
    fitted.load_state_dict(state)
    x = torch.randn((16, *IMAGE), generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        return fitted.eval()(x)
