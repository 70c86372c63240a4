# SPDX-License-Identifier: Apache-2.0
"""Units of a whole network are reordered, scattered and merged; its function must stay right."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from fedfusion_flwr.fusion import fuse_state_dicts
from fedfusion_flwr.strategies.fedma.layers import Layer, PlainNetwork
from fedfusion_flwr.strategies.fedma.matching import Matching, match_units
from tests.strategies.fedma.matched import BUILDS, layers_of, outputs, permuted, small_cnn
from tests.support import State, assert_identical


def merged_network(network: PlainNetwork, states: list[State], **settings: object) -> State:
    """All layers matched, without training in between."""
    arguments: dict = {"gamma": 1e-6, "sweeps": 2, "generator": np.random.default_rng(0)}
    arguments |= settings
    nets = dict(enumerate(states))
    for n, layer in enumerate(network.layers[:-1]):
        matching = match_units({j: layer.descriptors(net) for j, net in nets.items()}, **arguments)
        merged = layer.merge(nets, matching)
        nets = {
            j: network.widen_inputs({**net, **merged}, n + 1, matching.units[j], matching.width)
            for j, net in nets.items()
        }
    last = network.layers[-1]
    classes = Matching(dict.fromkeys(nets, np.arange(last.units)), last.units)
    return {**nets[0], **last.merge(nets, classes)}


@pytest.mark.parametrize("kind", BUILDS)
@pytest.mark.parametrize("settings", [{}, {"grow": False, "gamma": 7.0}])
def test_permuted_copies_merge_to_the_same_function(kind: str, settings: dict) -> None:
    model = small_cnn(kind)
    network, state = layers_of(model), model.state_dict()
    copies = [permuted(network, state, seed)[0] for seed in range(4)]
    merged = merged_network(network, copies, **settings)
    assert {k: v.shape for k, v in merged.items()} == {k: v.shape for k, v in state.items()}
    expected = outputs(model, state)
    torch.testing.assert_close(outputs(model, merged), expected, rtol=1e-5, atol=1e-5)
    # FedAvg of the same copies is another function.
    averaged = fuse_state_dicts(copies, torch.full((4,), 0.25))
    assert (outputs(model, averaged) - expected).abs().max() > 0.1 * expected.abs().max()


@pytest.mark.parametrize("kind", BUILDS)
def test_one_network_stays_as_it_is(kind: str) -> None:
    model = small_cnn(kind)
    merged = merged_network(layers_of(model), [model.state_dict()])
    assert_identical(merged, model.state_dict())


def test_identical_networks_merge_to_their_mean() -> None:
    """With a common order, the fixed width is FedAvg with equal weights, moments and all."""
    model = small_cnn("batchnorm")
    states = []
    for seed in range(3):
        noise = torch.rand(1000, generator=torch.Generator().manual_seed(seed))
        states.append(
            {
                key: value + (0.01 * noise[: value.numel()].view_as(value) if value.dim() else seed)
                for key, value in model.state_dict().items()
            }
        )
    merged = merged_network(layers_of(model), states, grow=False)
    fedavg = fuse_state_dicts(states, torch.full((3,), 1 / 3, dtype=torch.float64))
    for key, value in fedavg.items():
        torch.testing.assert_close(merged[key], value, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", BUILDS)
def test_permuting_and_taking_back_is_exact(kind: str) -> None:
    model = small_cnn(kind)
    network, state = layers_of(model), model.state_dict()
    moved, order = permuted(network, state, 3)
    assert any(not torch.equal(moved[key], state[key]) for key in state)
    torch.testing.assert_close(outputs(model, moved), outputs(model, state), rtol=1e-5, atol=1e-5)
    assert_identical(network.take(moved, [np.argsort(o) for o in order]), state)


@pytest.mark.parametrize("n", [0, 1, 2])
def test_scattered_inputs_keep_the_function(n: int) -> None:
    """Units of others join layer n below; the client's own function does not see them."""
    model = small_cnn("batchnorm")
    network, state = layers_of(model), model.state_dict()
    layer, width = network.layers[n], network.layers[n].units + 3
    units = np.random.default_rng(0).permutation(width)[: layer.units]
    index = torch.from_numpy(units)
    wide = layer.entries(state)
    for key, value in wide.items():
        if value.dim():
            wide[key] = torch.ones(width, *value.shape[1:]).index_copy(0, index, value)
    scattered = network.widen_inputs({**state, **wide}, n + 1, units, width)
    torch.testing.assert_close(
        outputs(model, scattered), outputs(model, state), rtol=1e-5, atol=1e-5
    )
    # Taking the client's units of the wide network brings its own back.
    own = [np.arange(other.units) for other in network.layers[:-1]]
    own[n] = units
    assert_identical(network.take(scattered, own), state)


def test_running_variances_are_those_of_the_members_mixture() -> None:
    layer = Layer("w", 1, 1, normalization="norm.")
    states = [
        {
            "w": torch.zeros(1, 1),
            "norm.running_mean": torch.tensor([mean]),
            "norm.running_var": torch.ones(1),
            "norm.num_batches_tracked": torch.tensor(count),
        }
        for mean, count in ((-2.0, 3), (2.0, 5))
    ]
    both = dict(enumerate(states)), Matching(dict.fromkeys(range(2), np.array([0])), 1)
    pooled = layer.merge(*both)
    assert pooled["norm.running_mean"].tolist() == [0.0]
    assert pooled["norm.running_var"].tolist() == [5.0]
    assert pooled["norm.num_batches_tracked"].tolist() == 5
    averaged = layer.merge(*both, pool_moments=False)
    assert averaged["norm.running_var"].tolist() == [1.0]


def test_descriptor_by_hand() -> None:
    """w = 3, b = 5, mean 1, variance 4 - eps, gamma 6, beta 7: scale 3, shift 7 + 3 (5 - 1)."""
    layer = Layer("w", 1, 1, bias="b", normalization="norm.", eps=0.25)
    values = {"b": 5.0, "norm.weight": 6.0, "norm.bias": 7.0}
    values |= {"norm.running_mean": 1.0, "norm.running_var": 3.75}
    state = {"w": torch.tensor([[3.0]])}
    state |= {key: torch.tensor([value]) for key, value in values.items()}
    assert layer.descriptors(state).tolist() == [[9.0, 19.0]]
    bare = {key: state[key] for key in ("w", "b", "norm.weight", "norm.bias")}
    assert layer.descriptors(bare).tolist() == [[18.0, 37.0]]
    plain = Layer("w", 1, 1, bias="b")
    assert plain.descriptors(bare).tolist() == [[3.0, 5.0]]


def test_descriptors_are_blind_to_how_a_function_is_divided() -> None:
    """Twice the weights under twice the running deviation: the same unit."""
    layer = Layer("0.weight", 4, 2, normalization="1.", eps=0.0)
    norm = nn.BatchNorm2d(4, eps=0.0)
    state = nn.Sequential(nn.Conv2d(2, 4, 3, bias=False), norm).state_dict()
    doubled = {
        **state,
        "0.weight": 2 * state["0.weight"],
        "1.running_var": 4 * state["1.running_var"],
    }
    np.testing.assert_allclose(layer.descriptors(doubled), layer.descriptors(state))
