# SPDX-License-Identifier: Apache-2.0
"""Recognizes the models whose hidden units FedMA may reorder: plain chains of layers."""

from __future__ import annotations

import copy
import dataclasses

import numpy as np
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from fedfusion_flwr.models import ModelError
from fedfusion_flwr.strategies.fedma.layers import Layer, PlainNetwork

_TOLERANCE = 1e-3
"""For float32 arithmetic in another order, relative to the largest output."""


def plain_network(model: nn.Module, name: str, input_shape: tuple[int, ...]) -> PlainNetwork:
    """The model's layers, in the order in which they are defined.

    Convolutions and fully connected layers, each followed by a normalization layer or not; all
    other layers must have no parameters. A trial makes sure that the model really is such a chain:
    with random parameters, reordering the hidden units must not change its outputs.

    Parameters
    ----------
    model : nn.Module
        Not changed.
    name : str
        The model's name, for messages.
    input_shape : tuple[int, ...]
        Shape of an example.

    Raises
    ------
    ModelError
        If the model is something else: names it and the reason.
    """
    try:
        network = PlainNetwork(tuple(_layers(model)))
        if network.depth < 2:
            raise _NotPlainError("it has no hidden layer")
        if not _may_be_reordered(model, network, input_shape):
            raise _NotPlainError(
                "reordering its hidden units changes its outputs, as with skip connections"
            )
    except _NotPlainError as reason:
        raise ModelError(
            "strategy 'fedma' matches the units of plain chains of convolutions and fully "
            f"connected layers; model {name!r} is not one: {reason}; use another model or strategy"
        ) from None
    return network


class _NotPlainError(Exception):
    """The model is not a plain network; says why."""


def _layers(model: nn.Module) -> list[Layer]:
    layers: list[Layer] = []
    for name, module in model.named_modules():
        own = [key for key, _ in module.named_parameters(recurse=False)]
        own += [key for key, _ in module.named_buffers(recurse=False)]
        if not own:
            continue
        kind = type(module).__name__
        if isinstance(module, nn.Conv2d | nn.Linear):
            layers.append(_layer(name, module, layers[-1].units if layers else None))
        elif isinstance(module, _BatchNorm | nn.GroupNorm | nn.LayerNorm):
            if not layers or layers[-1].normalization is not None:
                raise _NotPlainError(f"{kind} '{name}' does not follow a layer of units")
            if not _acts_per_unit(module, layers[-1].units):
                raise _NotPlainError(f"{kind} '{name}' does not treat each unit by itself")
            layers[-1] = dataclasses.replace(
                layers[-1], normalization=f"{name}.", eps=float(module.eps)
            )
        else:
            raise _NotPlainError(
                f"'{name}' is a {kind}" if name else f"{kind} has '{own[0]}' itself"
            )
    return layers


def _layer(name: str, module: nn.Conv2d | nn.Linear, units_below: int | None) -> Layer:
    kind = type(module).__name__
    if isinstance(module, nn.Conv2d) and module.groups > 1:
        raise _NotPlainError(f"{kind} '{name}' ties inputs to outputs in {module.groups} groups")
    units, given = module.weight.shape[:2]
    inputs = given if units_below is None else units_below
    # After a flattened image, a fully connected layer has several inputs per unit.
    fits = given == inputs if isinstance(module, nn.Conv2d) else given % inputs == 0
    if not fits:
        raise _NotPlainError(f"{kind} '{name}' has {given} inputs, the layer before {inputs} units")
    bias = None if module.bias is None else f"{name}.bias"
    return Layer(f"{name}.weight", units, inputs, bias)


def _acts_per_unit(module: nn.Module, units: int) -> bool:
    """Whether it has one entry per unit, and groups of one unit or of all units."""
    if isinstance(module, _BatchNorm):
        return module.num_features == units
    if isinstance(module, nn.GroupNorm):
        return module.num_channels == units and module.num_groups in (1, units)
    return isinstance(module, nn.LayerNorm) and module.normalized_shape == (units,)


def _may_be_reordered(
    model: nn.Module, network: PlainNetwork, input_shape: tuple[int, ...]
) -> bool:
    generator = torch.Generator().manual_seed(0)
    order = np.random.default_rng(0)
    trial = copy.deepcopy(model).cpu().eval()
    with torch.no_grad():
        for parameter in trial.parameters():
            # Initial values such as zeros could hide the effect of the order.
            noise = torch.randn(parameter.shape, generator=generator)
            spread = parameter[0].numel() ** -0.5 if parameter.dim() > 1 else 0.3
            parameter.copy_(spread * noise + (parameter.dim() == 1))
        x = torch.randn((2, *input_shape), generator=generator)
        before = trial(x)
        units = [order.permutation(layer.units) for layer in network.layers[:-1]]
        trial.load_state_dict(network.take(trial.state_dict(), units))
        after = trial(x)
    return bool((after - before).abs().max() <= _TOLERANCE * before.abs().max())
