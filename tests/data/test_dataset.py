# SPDX-License-Identifier: Apache-2.0
"""What `FederatedData` refuses."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from fedfusion_flwr.data import DataError, FederatedData

X, Y = torch.zeros(3, 1, 4, 4), torch.tensor([0, 1, 0])


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("x_train", torch.zeros(3, 4, 4), r"train split .* shape \(N, C, H, W\)"),
        ("x_test", torch.zeros(3, 1, 4, 4, dtype=torch.float64), "test split .* float32"),
        ("y_train", torch.zeros(2, dtype=torch.int64), "one int64 label for each of its 3"),
        ("y_test", torch.zeros(3), "test split .* int64"),
        ("y_test", torch.tensor([0, 1, 2]), "labels from 0 to 1, got labels from 0 to 2"),
        ("y_train", torch.tensor([0, -1, 0]), "got labels from -1 to 0"),
        ("x_test", torch.zeros(3, 1, 5, 4), "examples of one shape"),
        ("x_test y_test", [X[:0], Y[:0]], "at least one example"),
    ],
)
def test_wrong_arrays_are_refused(field: str, value: Any, message: str) -> None:
    valid = FederatedData("toy", X, Y, X, Y, num_classes=2)
    values = value if isinstance(value, list) else [value]
    with pytest.raises(DataError, match=message):
        replace(valid, **dict(zip(field.split(), values, strict=True)))
