# SPDX-License-Identifier: Apache-2.0
"""The models that clients train: one registry by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn

from fedfusion_flwr.errors import FedFusionError
from fedfusion_flwr.models.lenet import LeNet
from fedfusion_flwr.models.small_image import resnet18

__all__ = ["MODELS", "LeNet", "ModelEntry", "ModelError", "build_model", "resnet18"]


class ModelError(FedFusionError, ValueError):
    """An unknown model, or one that the data does not fit."""


class ModelEntry(NamedTuple):
    """A model of the registry.

    Attributes
    ----------
    build : Callable[[tuple[int, int, int], int], nn.Module]
        From (channels, height, width) and the number of classes.
    smallest_image : int
        Smallest height and width it takes, in pixels.
    """

    build: Callable[[tuple[int, int, int], int], nn.Module]
    smallest_image: int


MODELS: dict[str, ModelEntry] = {
    "lenet": ModelEntry(LeNet, 8),
    "resnet18": ModelEntry(resnet18, 8),
}


def build_model(
    name: str, input_shape: tuple[int, int, int], num_classes: int, seed: int
) -> nn.Module:
    """A freshly initialized model; the global random state stays as it was.

    Parameters
    ----------
    name : str
        A key of `MODELS`.
    input_shape : tuple[int, int, int]
        Channels, height and width of an image.
    num_classes : int
        Number of classes, at least 1.
    seed : int
        Equal seeds give equal weights.

    Returns
    -------
    nn.Module
        On the CPU, in training mode.

    Raises
    ------
    ModelError
        If the name is unknown or the images or classes do not fit the model.
    """
    if name not in MODELS:
        raise ModelError(f"`model` is {name!r}; known models: {', '.join(sorted(MODELS))}.")
    entry = MODELS[name]
    channels, height, width = input_shape
    if channels < 1 or min(height, width) < entry.smallest_image:
        raise ModelError(
            f"`model` {name!r} takes images of at least {entry.smallest_image}x"
            f"{entry.smallest_image} pixels with at least one channel, "
            f"got {channels} channels of {height}x{width}."
        )
    if num_classes < 1:
        raise ModelError(f"`model` {name!r} needs at least one class, got {num_classes}.")
    with torch.random.fork_rng(devices=[]):
        # Not torch.manual_seed, which would also reseed the accelerators.
        torch.default_generator.manual_seed(seed)
        return entry.build(input_shape, num_classes)
