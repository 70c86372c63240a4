# SPDX-License-Identifier: Apache-2.0
"""Turns the BatchNorm layers of a model into layers that need no batch."""

from __future__ import annotations

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from fedfusion_flwr.config import Normalization
from fedfusion_flwr.models.entry import ModelError


def convert_normalization(model: nn.Module, normalization: Normalization, groups: int = 2) -> None:
    """Replace every BatchNorm layer, at any depth and in place; draws no random numbers.

    A layer keeps its ``eps``; its affine parameters, if any, start anew at scale 1 and shift 0. The
    other layers and the names of all parameters stay the same. With ``none``, a convolution without
    bias before a removed layer has no shift left.

    Parameters
    ----------
    model : nn.Module
        Changed in place.
    normalization : {"batch", "group", "layer", "none"}
        ``batch`` keeps the model; ``group`` makes every layer a GroupNorm of ``groups`` groups (as
        in Fed-GN); ``layer`` normalizes an example over its channels and pixels, which is GroupNorm
        of one group; ``none`` removes the layers.
    groups : int
        Number of groups.

    Raises
    ------
    ModelError
        If a layer's channels do not divide into the groups, or a group would be a single feature,
        which always normalizes to 0.
    """
    if normalization == "batch":
        return
    groups = 1 if normalization == "layer" else groups
    replaced: dict[nn.Module, nn.Module] = {}
    # With duplicates: a layer that is used twice must stay one layer.
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if not isinstance(module, _BatchNorm):
            continue
        if module not in replaced:
            replaced[module] = (
                nn.Identity() if normalization == "none" else _group_norm(name, module, groups)
            )
        model.set_submodule(name, replaced[module])


def _group_norm(name: str, layer: _BatchNorm, groups: int) -> nn.GroupNorm:
    channels = layer.num_features
    if channels % groups:
        raise ModelError(
            f"`normalization-groups` is {groups}, but layer {name!r} has {channels} channels, "
            f"which {groups} does not divide; choose another number of groups."
        )
    if isinstance(layer, nn.BatchNorm1d) and channels == groups:
        raise ModelError(
            f"Layer {name!r} has {channels} features in {groups} normalization groups; a group of "
            "one feature would always normalize to 0: lower `normalization-groups` or use "
            'normalization = "batch" or "none".'
        )
    return nn.GroupNorm(groups, channels, eps=layer.eps, affine=layer.affine)
