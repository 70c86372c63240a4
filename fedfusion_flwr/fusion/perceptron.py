# SPDX-License-Identifier: Apache-2.0
"""A small multi-layer perceptron that knows its own gradient.

torch holds the parameters, NumPy computes with them: the networks are so small that torch, and
autograd most of all, takes longer to call an operation than to do it, and a round waits for
thousands of them.
"""

from __future__ import annotations

import itertools
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

Floats = NDArray[Any]


def shared(parameter: Tensor) -> Floats:
    """A parameter's values, in its own memory."""
    values: Floats = parameter.detach().numpy()
    return values


def shared_gradient(parameter: Tensor) -> Floats:
    """A parameter's gradient, in its own memory, which it is given if it has none."""
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    gradient: Floats = parameter.grad.numpy()
    return gradient


class _Layer(NamedTuple):
    weight: Floats
    bias: Floats
    by_weight: Floats
    by_bias: Floats


class Perceptron(nn.Sequential):
    """Linear layers with ReLU between them.

    From the first `trace` on the parameters and their gradients must stay where they are.

    Parameters
    ----------
    *widths : int
        Of the input, of every hidden layer and of the output; at least two.
    """

    def __init__(self, *widths: int) -> None:
        layers: list[nn.Module] = []
        for fan_in, fan_out in itertools.pairwise(widths):
            layers += [nn.Linear(fan_in, fan_out), nn.ReLU()]
        super().__init__(*layers[:-1])

    @cached_property
    def _layers(self) -> list[_Layer]:
        linear = [layer for layer in self if isinstance(layer, nn.Linear)]
        return [
            _Layer(
                shared(layer.weight),
                shared(layer.bias),
                shared_gradient(layer.weight),
                shared_gradient(layer.bias),
            )
            for layer in linear
        ]

    def trace(self, x: Floats) -> list[Floats]:
        """The input of every linear layer, and last the output, for x of shape (K, input)."""
        trace = [x]
        for number, layer in enumerate(self._layers, 1):
            sums = trace[-1] @ layer.weight.T
            sums += layer.bias
            if number < len(self._layers):
                np.maximum(sums, 0, out=sums)
            trace.append(sums)
        return trace

    def backward(self, trace: list[Floats], by_output: Floats) -> Floats:
        """Set every parameter's ``grad``, given the gradient by the output, (K, output).

        Returns
        -------
        Floats
            The gradient by the first layer's sums, of which `by_input` makes that by the input.
        """
        gradient = by_output
        for number in reversed(range(len(self._layers))):
            layer = self._layers[number]
            np.matmul(gradient.T, trace[number], out=layer.by_weight)
            np.add.reduce(gradient, 0, out=layer.by_bias)
            if number:
                gradient = gradient @ layer.weight
                gradient *= trace[number] > 0
        return gradient

    def by_input(self, by_first_sums: Floats) -> Floats:
        """The gradient by the input, (K, input)."""
        by_input: Floats = by_first_sums @ self._layers[0].weight
        return by_input
