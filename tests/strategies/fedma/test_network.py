# SPDX-License-Identifier: Apache-2.0
"""Which models FedMA takes, which it refuses and what it says; and models of other widths."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fedfusion_flwr.models import ModelError, build_model
from fedfusion_flwr.models.resize import fit_to_state
from fedfusion_flwr.strategies.fedma.layers import Layer
from fedfusion_flwr.strategies.fedma.network import plain_network
from tests.strategies.fedma.matched import BUILDS, IMAGE, layers_of, small_cnn


def test_lenet() -> None:
    model = build_model("lenet", (1, 28, 28), 10, seed=0)
    network = plain_network(model, "lenet", (1, 28, 28))
    assert network.layers == (
        Layer("features.0.0.weight", 16, 1, normalization="features.0.1.", eps=1e-5),
        Layer("features.1.0.weight", 32, 16, normalization="features.1.1.", eps=1e-5),
        Layer("head.0.weight", 60, 32, bias="head.0.bias"),
        Layer("head.2.weight", 10, 60, bias="head.2.bias"),
    )
    state = model.state_dict()
    assert sorted(network.keys_below(4, state)) == sorted(state)
    assert network.keys_below(1, state) == [key for key in state if key.startswith("features.0.")]


@pytest.mark.parametrize("kind", BUILDS)
def test_plain_networks_are_recognized_and_left_alone(kind: str) -> None:
    model = small_cnn(kind)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    assert [layer.units for layer in layers_of(model).layers] == [5, 6, 7, 3]
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


class Skip(nn.Module):
    """Widths chain, but the second convolution's units are added to the first's."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.out = nn.Linear(4 * 64, 3)
        nn.init.zeros_(self.second.weight)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.out((x + self.second(x)).flatten(1))


class Scaled(nn.Module):
    """A parameter outside any layer."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))
        self.hidden, self.out = nn.Linear(128, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * self.out(self.hidden(x.flatten(1)).relu())


def sequential(*layers: nn.Module) -> nn.Sequential:
    return nn.Sequential(*layers, nn.Flatten(), nn.LazyLinear(3))


REFUSED = {
    "resnet18": (
        lambda: build_model("resnet18", IMAGE, 3, seed=0),
        "Conv2d 'layer2.0.downsample.0' has 64 inputs, the layer before 128 units",
    ),
    "skip connection": (Skip, "reordering its hidden units changes its outputs"),
    "depthwise": (
        lambda: sequential(nn.Conv2d(2, 4, 3), nn.Conv2d(4, 4, 3, groups=4)),
        "Conv2d '1' ties inputs to outputs in 4 groups",
    ),
    "grouped norm": (
        lambda: sequential(nn.Conv2d(2, 8, 3), nn.GroupNorm(2, 8)),
        "GroupNorm '1' does not treat each unit by itself",
    ),
    "norm of pixels": (
        lambda: sequential(nn.Conv2d(2, 4, 3), nn.Flatten(), nn.BatchNorm1d(4 * 36)),
        "BatchNorm1d '2' does not treat each unit by itself",
    ),
    "norm of the image": (
        lambda: sequential(nn.BatchNorm2d(2), nn.Conv2d(2, 4, 3)),
        "BatchNorm2d '0' does not follow a layer of units",
    ),
    "two norms": (
        lambda: sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.BatchNorm2d(4)),
        "BatchNorm2d '2' does not follow a layer of units",
    ),
    "recurrent": (lambda: nn.Sequential(nn.Flatten(), nn.LSTM(128, 3)), "'1' is a LSTM"),
    "scale": (Scaled, "Scaled has 'scale' itself"),
    "linear": (lambda: sequential(), "it has no hidden layer"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_other_models_are_refused(name: str) -> None:
    build, reason = REFUSED[name]
    model = build()
    if name != "resnet18" and name != "recurrent":
        model(torch.zeros(2, *IMAGE))  # makes the lazy layer
    with pytest.raises(ModelError) as problem:
        plain_network(model, name, IMAGE)
    sentence = str(problem.value)
    assert sentence.startswith("strategy 'fedma' matches the units of plain chains")
    assert f"model '{name}' is not one: {reason}" in sentence
    assert "\n" not in sentence


def test_equal_shapes_give_the_model_itself() -> None:
    model = small_cnn("batchnorm")
    assert fit_to_state(model, model.state_dict()) is model


@pytest.mark.parametrize("kind", BUILDS)
def test_model_of_other_widths(kind: str) -> None:
    model, network = small_cnn(kind), layers_of(small_cnn(kind))
    state = model.state_dict()
    before = {key: value.shape for key, value in state.items()}
    units = [np.arange(7) % 5, np.array([5, 4, 3]), np.arange(8) % 7]
    wide = network.take(state, units)
    fitted = fit_to_state(model, wide)
    assert fitted is not model
    fitted.load_state_dict(wide)
    assert {key: value.shape for key, value in model.state_dict().items()} == before
    assert all(isinstance(p, nn.Parameter) and p.requires_grad for p in fitted.parameters())
    convolutions = [m for m in fitted.modules() if isinstance(m, nn.Conv2d)]
    assert [(c.in_channels, c.out_channels) for c in convolutions] == [(2, 7), (7, 3)]
    linear = [m for m in fitted.modules() if isinstance(m, nn.Linear)]
    assert [(m.in_features, m.out_features) for m in linear] == [(12, 8), (8, 3)]
    for module in fitted.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.num_features == len(module.weight)
        if isinstance(module, nn.GroupNorm):
            assert module.num_channels == len(module.weight)
            assert module.num_groups == (1 if kind == "one group" else module.num_channels)
    # It trains: gradients reach every parameter.
    fitted.train()(torch.randn(4, *IMAGE)).square().sum().backward()
    assert all(p.grad is not None for p in fitted.parameters())


def test_layer_norm_of_other_width() -> None:
    model = nn.Sequential(nn.Linear(2, 4), nn.LayerNorm(4), nn.Linear(4, 2))
    other = nn.Sequential(nn.Linear(2, 6), nn.LayerNorm(6), nn.Linear(6, 2))
    fitted = fit_to_state(model, other.state_dict())
    fitted.load_state_dict(other.state_dict())
    x = torch.randn(3, 2)
    assert torch.equal(fitted(x), other(x))


def test_other_shapes_are_refused() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3))
    with pytest.raises(ModelError, match=r"'weight' of shape \(2, 1, 3, 3\) cannot become"):
        fit_to_state(model, {"0.weight": torch.zeros(2, 1, 5, 5)})
    with pytest.raises(ModelError, match="'0' is a Embedding, whose width cannot be changed"):
        fit_to_state(nn.Sequential(nn.Embedding(3, 2)), {"0.weight": torch.zeros(4, 2)})
