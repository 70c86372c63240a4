# SPDX-License-Identifier: Apache-2.0
"""What the registry says of a model, and what it tells one."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fedfusion_flwr.errors import FedFusionError


class ModelError(FedFusionError, ValueError):
    """An unknown model, or one that the data, the normalization or the strategy does not fit."""


class DataShape(NamedTuple):
    """What a model must know of the data.

    Attributes
    ----------
    input_shape : tuple[int, ...]
        (channels, height, width) of an image, or (length,) of a text.
    num_classes : int
        Width of the output.
    vocabulary_size : int
        Number of words of texts.
    """

    input_shape: tuple[int, ...]
    num_classes: int
    vocabulary_size: int = 0

    @property
    def image(self) -> tuple[int, int, int]:
        """Channels, height and width."""
        channels, height, width = self.input_shape
        return channels, height, width

    def examples(self, count: int) -> Tensor:
        """Inputs to try a model with, all ones: white images, or texts of the unknown word."""
        is_text = len(self.input_shape) == 1
        return torch.ones(count, *self.input_shape, dtype=torch.int64 if is_text else torch.float32)


class ModelEntry(NamedTuple):
    """A model of the registry.

    Attributes
    ----------
    build : Callable[[DataShape], nn.Module]
        Makes it.
    smallest_image : int
        Smallest height and width it takes, in pixels; 0 for a model of texts.
    """

    build: Callable[[DataShape], nn.Module]
    smallest_image: int
