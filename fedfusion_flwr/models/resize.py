# SPDX-License-Identifier: Apache-2.0
"""Models of other widths than they were built with, for strategies whose model grows."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fedfusion_flwr.models.entry import ModelError


def fit_to_state(model: nn.Module, state: Mapping[str, Tensor]) -> nn.Module:
    """A model that the state dict can be loaded into.

    Parameters
    ----------
    model : nn.Module
        Not changed.
    state : Mapping[str, Tensor]
        Its layers may be wider or narrower than the model's; only shapes are read.

    Returns
    -------
    nn.Module
        The model itself if all shapes agree; else a copy whose convolutions, fully connected and
        normalization layers have the state's widths, and meaningless values.

    Raises
    ------
    ModelError
        If a shape differs in another kind of layer, or where its kind cannot vary.
    """
    own = model.state_dict()
    differing = [key for key in own if key in state and own[key].shape != state[key].shape]
    if not differing:
        return model
    fitted = copy.deepcopy(model)
    for key in differing:
        name, _, tensor = key.rpartition(".")
        module = fitted.get_submodule(name)
        _resize(module, tensor, state[key].shape)
        _correct_widths(name, module)
    return fitted


def _resize(module: nn.Module, name: str, shape: torch.Size) -> None:
    old = getattr(module, name)
    if old.dim() != len(shape) or old.shape[2:] != shape[2:]:
        raise ModelError(f"'{name}' of shape {tuple(old.shape)} cannot become {tuple(shape)}")
    value = old.new_zeros(shape)
    setattr(module, name, nn.Parameter(value) if isinstance(old, nn.Parameter) else value)


def _correct_widths(name: str, module: nn.Module) -> None:
    """Set the attributes to what the tensors are."""
    if isinstance(module, nn.Conv2d) and module.groups == 1:
        module.out_channels, module.in_channels = module.weight.shape[:2]
    elif isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif isinstance(module, _BatchNorm) and module.running_mean is not None:
        module.num_features = len(module.running_mean)
    elif isinstance(module, nn.GroupNorm):
        if module.num_groups == module.num_channels:
            module.num_groups = len(module.weight)
        module.num_channels = len(module.weight)
    elif isinstance(module, nn.LayerNorm):
        module.normalized_shape = tuple(module.weight.shape)
    else:
        raise ModelError(f"'{name}' is a {type(module).__name__}, whose width cannot be changed")
