# SPDX-License-Identifier: Apache-2.0
"""Turned images of planted components."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fedfusion_flwr.data.partition import (
    PartitionError,
    transform_component,
)


def test_quarter_turns_are_exact() -> None:
    x = torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]]).repeat(4, 1, 1, 1)
    turned = transform_component(x, np.arange(4), 4, "rotate").tolist()
    assert [image[0] for image in turned] == [
        [[1, 2], [3, 4]],
        [[2, 4], [1, 3]],
        [[4, 3], [2, 1]],
        [[3, 1], [4, 2]],
    ]
    half = transform_component(x, np.array([0, 1, 1, 0]), 2, "rotate")
    assert half[1, 0].tolist() == [[4, 3], [2, 1]]
    assert torch.equal(half[3], x[3])


def test_other_turns_agree_with_quarter_turns_in_direction() -> None:
    # A bright pixel right of the centre goes up when turned counterclockwise by 60, then 120.
    x = torch.full((3, 1, 21, 21), -0.5)
    x[:, 0, 9:12, 16:19] = 2.0
    turned = transform_component(x, np.array([0, 1, 2]), 6, "rotate")
    rows, columns = torch.meshgrid(torch.arange(21.0), torch.arange(21.0), indexing="ij")
    for m, image in enumerate(turned[:, 0]):
        weight = (image + 0.5) / (image + 0.5).sum()
        angle = torch.atan2(10 - (weight * rows).sum(), (weight * columns).sum() - 10)
        assert float(angle.rad2deg()) == pytest.approx(60 * m, abs=2)


def test_uncovered_corners_are_dark() -> None:
    x = torch.full((1, 2, 16, 16), -0.5)
    x[:, :, 6:10, 6:10] = 2.0
    turned = transform_component(x, np.array([1]), 8, "rotate")
    assert turned[0, :, 0, 0].tolist() == pytest.approx([-0.5, -0.5])
    assert turned.min().item() == pytest.approx(-0.5, abs=1e-5)


def test_transform_leaves_its_input_alone() -> None:
    x = torch.randn(6, 1, 8, 8)
    before = x.clone()
    assert transform_component(x, np.zeros(6, dtype=np.int64), 5, "none") is x
    transform_component(x, np.arange(6) % 5, 5, "rotate")
    assert torch.equal(x, before)


def test_rotation_needs_square_images() -> None:
    with pytest.raises(PartitionError, match=r"`component-transform` .* 8x9"):
        transform_component(torch.zeros(1, 1, 8, 9), np.array([0]), 4, "rotate")


def test_transform_needs_a_component_for_each_image() -> None:
    with pytest.raises(ValueError, match=r"shape \(2,\)"):
        transform_component(torch.zeros(2, 1, 8, 8), np.array([0]), 4, "rotate")
