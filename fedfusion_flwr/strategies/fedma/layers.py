# SPDX-License-Identifier: Apache-2.0
"""A chain of convolutions and fully connected layers, seen as units that can be reordered.

A layer's units are the rows of its weight; each has its bias and, where a normalization layer
follows, its scale, shift and running statistics. The next layer's inputs are those units, in blocks
of one feature or, after a flattened image, of all pixels of a channel.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fedfusion_flwr.strategies.fedma.matching import Floats, Matching, Units, merge_units

State = dict[str, Tensor]


@dataclass(frozen=True)
class Layer:
    """One layer of units.

    Attributes
    ----------
    weight : str
        State-dict key of its weight, (units, inputs * block) or (units, inputs, height, width).
    units : int
        Its width in the model as it is built.
    inputs : int
        Width of the layer before, or number of channels of the image.
    bias : str or None
        Key of its bias, (units,).
    normalization : str or None
        Prefix of the keys of the normalization layer that follows, its entries (units,).
    eps : float
        Epsilon of that normalization layer.
    """

    weight: str
    units: int
    inputs: int
    bias: str | None = None
    normalization: str | None = None
    eps: float = 0.0

    def owns(self, key: str) -> bool:
        """Whether a state-dict entry belongs to the layer, its normalization included."""
        norm = self.normalization
        return key in (self.weight, self.bias) or (norm is not None and key.startswith(norm))

    def entries(self, state: Mapping[str, Tensor]) -> State:
        """The layer's part of a state dict."""
        return {key: value for key, value in state.items() if self.owns(key)}

    def descriptors(self, state: Mapping[str, Tensor]) -> Floats:
        """What units are compared by, (L_j, D): weights and bias as the next layer sees them.

        A normalization layer is folded in: with scale a = gamma / sqrt(variance + eps), a row is
        (a w, beta + a (b - mean)). Units that compute the same have the same row, however their
        function is divided between weight and normalization.
        """
        weight = state[self.weight].double().flatten(1)
        zeros = torch.zeros(len(weight), dtype=torch.float64)

        def entry(name: str, otherwise: Tensor) -> Tensor:
            return state.get(f"{self.normalization}{name}", otherwise).double()

        deviation = (entry("running_var", zeros + 1 - self.eps) + self.eps).sqrt()
        scale = entry("weight", zeros + 1) / deviation
        bias = state[self.bias].double() if self.bias else zeros
        shift = entry("bias", zeros) + scale * (bias - entry("running_mean", zeros))
        rows = torch.cat([scale[:, None] * weight, shift[:, None]], 1)
        return np.asarray(rows.numpy())

    def merge(
        self,
        states: Mapping[int, Mapping[str, Tensor]],
        matching: Matching,
        *,
        weights: Tensor | None = None,
        pool_moments: bool = True,
    ) -> State:
        """The layer of ``matching.width`` units that are means of the members'; see `merge_units`.

        Running variances are those of the members' mixture if ``pool_moments``, else means;
        ``num_batches_tracked`` takes the maximum.
        """
        units = [matching.units[client] for client in states]

        def parts_of(key: str) -> list[Tensor]:
            return [state[key] for state in states.values()]

        def mean(parts: list[Tensor]) -> Tensor:
            return merge_units(parts, units, matching.width, weights)

        merged: State = {}
        for key, value in self.entries(next(iter(states.values()))).items():
            parts = parts_of(key)
            if not value.dim():
                merged[key] = torch.stack(parts).amax(0)
            elif pool_moments and key == f"{self.normalization}running_var":
                means = [m.double() for m in parts_of(f"{self.normalization}running_mean")]
                centre = mean(means)
                spread = [
                    variance.double() + (m - centre[torch.from_numpy(held)]).square()
                    for variance, m, held in zip(parts, means, units, strict=True)
                ]
                merged[key] = mean(spread).to(value.dtype)
            else:
                merged[key] = mean(parts)
        return merged


@dataclass(frozen=True)
class PlainNetwork:
    """The layers from the image to the classes; together they own every entry of a state dict."""

    layers: tuple[Layer, ...]

    @property
    def depth(self) -> int:
        """N, the number of layers."""
        return len(self.layers)

    def keys_below(self, depth: int, state: Mapping[str, Tensor]) -> list[str]:
        """Names of the entries of the first ``depth`` layers."""
        return [key for layer in self.layers[:depth] for key in layer.entries(state)]

    def take(self, state: Mapping[str, Tensor], units: Sequence[Units]) -> State:
        """The network that has only the given hidden units, in the given order.

        Parameters
        ----------
        state : Mapping[str, Tensor]
            State dict of any widths.
        units : Sequence[NDArray[np.int64]]
            Which units to take from each hidden layer, lowest first, (L_n,).
        """
        taken = dict(state)
        for n, layer in enumerate(self.layers):
            if n > 0:
                blocks = _blocks(taken[layer.weight], len(state[self.layers[n - 1].weight]))
                picked = blocks[:, torch.from_numpy(units[n - 1])]
                taken[layer.weight] = _unblocked(picked, taken[layer.weight])
            if n < len(units):
                index = torch.from_numpy(units[n])
                for key, value in layer.entries(taken).items():
                    taken[key] = value[index] if value.dim() else value
        return taken

    def widen_inputs(self, state: Mapping[str, Tensor], n: int, units: Units, width: int) -> State:
        """Layer ``n`` with the inputs of a layer below of ``width`` units.

        Input i moves to ``units[i]``; the columns of the other units are zero, so that the layer
        still computes the same.
        """
        layer = self.layers[n]
        blocks = _blocks(state[layer.weight], len(units))
        wide = blocks.new_zeros(len(blocks), width, blocks.shape[2])
        wide.index_copy_(1, torch.from_numpy(units), blocks)
        return {**state, layer.weight: _unblocked(wide, state[layer.weight])}


def _blocks(weight: Tensor, inputs: int) -> Tensor:
    """A weight as (units, inputs, block)."""
    return weight.reshape(len(weight), inputs, -1)


def _unblocked(blocks: Tensor, like: Tensor) -> Tensor:
    """Invert `_blocks`, for a weight of as many axes as ``like``."""
    return blocks.reshape(len(blocks), -1, *like.shape[2:]).contiguous()
