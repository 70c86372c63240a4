# SPDX-License-Identifier: Apache-2.0
"""The models that clients train: one registry by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn

from fedfusion_flwr.config import RunConfig
from fedfusion_flwr.data.dataset import FederatedData
from fedfusion_flwr.errors import FedFusionError
from fedfusion_flwr.models.bilstm import BiLSTM
from fedfusion_flwr.models.lenet import LeNet
from fedfusion_flwr.models.small_image import resnet18

__all__ = [
    "MODELS",
    "BiLSTM",
    "DataShape",
    "LeNet",
    "ModelEntry",
    "ModelError",
    "build_model",
    "model_for",
    "resnet18",
]


class ModelError(FedFusionError, ValueError):
    """An unknown model, or one that the data does not fit."""


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


MODELS: dict[str, ModelEntry] = {
    "bilstm": ModelEntry(lambda shape: BiLSTM(shape.vocabulary_size, shape.num_classes), 0),
    "lenet": ModelEntry(lambda shape: LeNet(shape.image, shape.num_classes), 8),
    "resnet18": ModelEntry(lambda shape: resnet18(shape.image, shape.num_classes), 8),
}


def build_model(
    name: str,
    input_shape: tuple[int, ...],
    num_classes: int,
    seed: int,
    *,
    vocabulary_size: int = 0,
) -> nn.Module:
    """A freshly initialized model; the global random state stays as it was.

    Parameters
    ----------
    name : str
        A key of `MODELS`.
    input_shape : tuple[int, ...]
        Shape of an example: (channels, height, width) of an image or (length,) of a text.
    num_classes : int
        Number of classes, at least 1.
    seed : int
        Equal seeds give equal weights.
    vocabulary_size : int
        Number of words, for texts.

    Returns
    -------
    nn.Module
        On the CPU, in training mode.

    Raises
    ------
    ModelError
        If the name is unknown or the examples or classes do not fit the model.
    """
    if name not in MODELS:
        raise ModelError(f"`model` is {name!r}; known models: {', '.join(sorted(MODELS))}.")
    entry = MODELS[name]
    _check_fit(name, entry, input_shape)
    if num_classes < 1:
        raise ModelError(f"`model` {name!r} needs at least one class, got {num_classes}.")
    with torch.random.fork_rng(devices=[]):
        # Not torch.manual_seed, which would also reseed the accelerators.
        torch.default_generator.manual_seed(seed)
        return entry.build(DataShape(input_shape, num_classes, vocabulary_size))


def model_for(config: RunConfig, data: FederatedData, seed: int) -> nn.Module:
    """The model that a run config names, for the given data."""
    return build_model(
        config.model,
        data.input_shape,
        data.num_classes,
        seed,
        vocabulary_size=len(data.vocabulary),
    )


def _check_fit(name: str, entry: ModelEntry, input_shape: tuple[int, ...]) -> None:
    is_text = len(input_shape) == 1
    if is_text != (entry.smallest_image == 0):
        takes, given = ("texts", "images") if not is_text else ("images", "texts")
        raise ModelError(f"`model` {name!r} takes {takes}, but `dataset` holds {given}.")
    if is_text:
        return
    channels, height, width = input_shape
    if channels < 1 or min(height, width) < entry.smallest_image:
        raise ModelError(
            f"`model` {name!r} takes images of at least {entry.smallest_image}x"
            f"{entry.smallest_image} pixels with at least one channel, "
            f"got {channels} channels of {height}x{width}."
        )
