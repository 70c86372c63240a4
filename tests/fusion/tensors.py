# SPDX-License-Identifier: Apache-2.0
"""Small tensors and state dicts whose results can be worked out by hand."""

from __future__ import annotations

import torch
from hypothesis import settings
from torch import Tensor

State = dict[str, Tensor]
many = settings(deadline=None, max_examples=60)


def f64(*values: object) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def layer(weight: float, mean: float, variance: float, batches: int = 0) -> State:
    return {
        "0.weight": torch.tensor([weight]),
        "1.running_mean": torch.tensor([mean]),
        "1.running_var": torch.tensor([variance]),
        "1.num_batches_tracked": torch.tensor(batches),
    }


def values(state: State) -> dict[str, object]:
    return {key: value.squeeze().item() for key, value in state.items()}
