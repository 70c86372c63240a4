# SPDX-License-Identifier: Apache-2.0
"""Small plain networks with random values, with and without normalization."""

from __future__ import annotations

import copy

import numpy as np
import torch
from torch import Tensor, nn

from fedfusion_flwr.models.resize import fit_to_state
from fedfusion_flwr.strategies.fedma.layers import PlainNetwork
from fedfusion_flwr.strategies.fedma.network import plain_network

State = dict[str, Tensor]
IMAGE = (2, 8, 8)
BUILDS = ("batchnorm", "bias", "instances", "one group")


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
