# SPDX-License-Identifier: Apache-2.0
"""The image models, and a short way to train any model."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from fedfusion_flwr.app.training import train
from fedfusion_flwr.models import MODELS
from fedfusion_flwr.randomness import torch_generator

IMAGE_MODELS = sorted(name for name, entry in MODELS.items() if entry.smallest_image)


def fit(model: nn.Module, x: Tensor, y: Tensor, *, seed: int = 0, **changes: Any) -> float:
    """Train with momentum 0.9; the loss."""
    settings = {"epochs": 1, "batch_size": 4, "learning_rate": 1e-3, "weight_decay": 0.0, **changes}
    generator = torch_generator(seed, "training", 1)
    return train(model, x, y, momentum=0.9, generator=generator, **settings).loss
