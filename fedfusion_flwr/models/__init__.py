# SPDX-License-Identifier: Apache-2.0
"""The models that clients train: one registry by name."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn

from fedfusion_flwr.config import Normalization, RunConfig
from fedfusion_flwr.data.dataset import FederatedData
from fedfusion_flwr.models.bilstm import BiLSTM
from fedfusion_flwr.models.custom import build_custom, check_logits
from fedfusion_flwr.models.entry import DataShape, ModelEntry, ModelError
from fedfusion_flwr.models.lenet import LeNet
from fedfusion_flwr.models.normalization import convert_normalization
from fedfusion_flwr.models.small_image import densenet121, mobilenetv2, resnet18
from fedfusion_flwr.randomness import derived_seed

__all__ = [
    "MODELS",
    "BiLSTM",
    "DataShape",
    "LeNet",
    "ModelEntry",
    "ModelError",
    "build_model",
    "convert_normalization",
    "densenet121",
    "mobilenetv2",
    "model_for",
    "resnet18",
    "shape_of",
]

MODELS: dict[str, ModelEntry] = {
    "bilstm": ModelEntry(lambda shape: BiLSTM(shape.vocabulary_size, shape.num_classes), 0),
    "lenet": ModelEntry(lambda shape: LeNet(shape.image, shape.num_classes), 8),
    "resnet18": ModelEntry(lambda shape: resnet18(shape.image, shape.num_classes), 8),
    "mobilenetv2": ModelEntry(lambda shape: mobilenetv2(shape.image, shape.num_classes), 8),
    "densenet121": ModelEntry(lambda shape: densenet121(shape.image, shape.num_classes), 8),
}


def build_model(
    name: str,
    input_shape: tuple[int, ...],
    num_classes: int,
    seed: int,
    *,
    vocabulary_size: int = 0,
    normalization: Normalization = "batch",
    groups: int = 2,
) -> nn.Module:
    """A freshly initialized model; the global random state does not change.

    Parameters
    ----------
    name : str
        A key of `MODELS`, or ``"module:function"``: a function that takes a `DataShape` and returns
        a module, which is tried on two examples.
    input_shape : tuple[int, ...]
        Shape of an example: (channels, height, width) of an image or (length,) of a text.
    num_classes : int
        Number of classes, at least 1.
    seed : int
        Equal seeds give equal weights.
    vocabulary_size : int
        Number of words, for texts.
    normalization : {"batch", "group", "layer", "none"}
        What BatchNorm layers become, see `convert_normalization`; all other weights are the same.
    groups : int
        Number of groups for ``group``.

    Returns
    -------
    nn.Module
        On the CPU, in training mode.

    Raises
    ------
    ModelError
        If the name is unknown, the data does not fit the model, or the user's own model cannot be
        built or fails.
    """
    custom, shape = ":" in name, DataShape(input_shape, num_classes, vocabulary_size)
    if not custom:
        _check_fit(name, shape)
    if num_classes < 1:
        raise ModelError(f"`model` {name!r} needs at least one class, got {num_classes}.")
    with torch.random.fork_rng(devices=[]):
        # Not torch.manual_seed, which would also reseed the accelerators.
        torch.default_generator.manual_seed(seed)
        model = build_custom(name, shape) if custom else MODELS[name].build(shape)
        convert_normalization(model, normalization, groups)
        if custom:
            check_logits(name, model, shape)
    return model


def shape_of(data: FederatedData) -> DataShape:
    """What a model must know of the given data."""
    return DataShape(data.input_shape, data.num_classes, len(data.vocabulary))


def model_for(config: RunConfig, data: FederatedData, number: int = 0) -> nn.Module:
    """The untrained model that a run config names, for the given data.

    Number 0 is the global model of the config's seed; every other number differs in its weights.
    """
    seed = derived_seed(config.seed, "initial-model", number)
    return build_model(
        config.model,
        data.input_shape,
        data.num_classes,
        seed,
        vocabulary_size=len(data.vocabulary),
        normalization=cast(Any, config.model_normalization),
        groups=config.normalization_groups,
    )


def _check_fit(name: str, shape: DataShape) -> None:
    if name not in MODELS:
        raise ModelError(f"`model` is {name!r}; known models: {', '.join(sorted(MODELS))}.")
    smallest = MODELS[name].smallest_image
    if shape.is_text != (smallest == 0):
        takes, given = ("images", "texts") if shape.is_text else ("texts", "images")
        raise ModelError(f"`model` {name!r} takes {takes}, but `dataset` holds {given}.")
    if shape.is_text:
        return
    channels, height, width = shape.image
    if channels < 1 or min(height, width) < smallest:
        raise ModelError(
            f"`model` {name!r} takes images of at least {smallest}x{smallest} pixels with at least "
            f"one channel, got {channels} channels of {height}x{width}."
        )
