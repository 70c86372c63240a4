# SPDX-License-Identifier: Apache-2.0
"""The user's own models: ``model = "module:function"``."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fedfusion_flwr.models.entry import DataShape, ModelError
from fedfusion_flwr.user_code import described, load_function


def build_custom(reference: str, shape: DataShape) -> nn.Module:
    """The module that the user's function returns for data of that shape.

    Raises
    ------
    ModelError
        If it cannot be imported, fails, or returns something else.
    """
    function = load_function("model", reference, ModelError)
    try:
        model = function(shape)
    except Exception as problem:
        raise ModelError(
            f"`model` {reference!r} fails for {shape} with {described(problem)}."
        ) from problem
    if not isinstance(model, nn.Module):
        raise ModelError(
            f"`model` {reference!r} must return a torch.nn.Module, "
            f"but it returned {type(model).__name__}."
        )
    return model


def check_logits(reference: str, model: nn.Module, shape: DataShape) -> None:
    """Try two examples in eval mode; leaves the model in training mode.

    Raises
    ------
    ModelError
        If the forward pass fails or does not return ``num_classes`` logits for each example.
    """
    examples = shape.examples(2)
    takes = f"examples of shape {tuple(examples.shape)} and type {examples.dtype}"
    model.eval()
    try:
        with torch.no_grad():
            logits = model(examples)
    except Exception as problem:
        raise ModelError(
            f"`model` {reference!r} must take {takes}, but it fails with {described(problem)}."
        ) from problem
    model.train()
    found = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
    if found != (2, shape.num_classes):
        raise ModelError(
            f"`model` {reference!r} must give logits of shape {(2, shape.num_classes)} for "
            f"{takes}, but it gave {found}."
        )
