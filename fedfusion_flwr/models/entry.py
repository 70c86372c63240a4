# SPDX-License-Identifier: Apache-2.0
"""What the registry knows of a model, and what a model must know of the data."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fedfusion_flwr.errors import FedFusionError


class ModelError(FedFusionError, ValueError):
    """An unknown model, or one that does not fit the data, normalization or strategy."""


class DataShape(NamedTuple):
    """What a model must know of the data.

    Attributes
    ----------
    input_shape : tuple[int, ...]
        (channels, height, width) of an image, or (length,) of a text.
    num_classes : int
        Width of the output.
    vocabulary_size : int
        Number of words, for texts.
    """

    input_shape: tuple[int, ...]
    num_classes: int
    vocabulary_size: int = 0

    @property
    def image(self) -> tuple[int, int, int]:
        """Channels, height and width."""
        channels, height, width = self.input_shape
        return channels, height, width

    @property
    def is_text(self) -> bool:
        """Whether the examples are texts, not images."""
        return len(self.input_shape) == 1

    def examples(self, count: int) -> Tensor:
        """Inputs to try a model with, all ones: white images, or texts of the unknown word."""
        dtype = torch.int64 if self.is_text else torch.float32
        return torch.ones(count, *self.input_shape, dtype=dtype)


class ModelEntry(NamedTuple):
    """A model of the registry.

    Attributes
    ----------
    build : Callable[[DataShape], nn.Module]
        Makes the model.
    smallest_image : int
        Smallest height and width in pixels; 0 for a model of texts.
    """

    build: Callable[[DataShape], nn.Module]
    smallest_image: int
