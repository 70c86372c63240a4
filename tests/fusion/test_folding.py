# SPDX-License-Identifier: Apache-2.0
"""Folding of wide statistics: what it keeps."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedfusion_flwr.fusion.folding import Folding
from fedfusion_flwr.fusion.standardizer import Standardizer


def unit(width: int) -> Standardizer:
    """A standardizer that changes nothing within its limits of +-5."""
    ones = torch.ones(width, dtype=torch.float64)
    return Standardizer(torch.zeros_like(ones), ones, ones.bool())


def test_narrow_statistics_stay_as_they_are() -> None:
    x = torch.randn(7, 64, generator=torch.Generator().manual_seed(0)).clamp(-5, 5)
    folding = Folding(64, 64, seed=0)
    assert not folding.folds
    assert torch.equal(folding.features(unit(64), x), x)


def test_every_statistic_goes_into_one_sum_with_a_sign() -> None:
    """Five statistics in two sums: three layers, so that each counts +-1 / sqrt(3)."""
    features = Folding(5, 2, seed=0).features(unit(5), torch.eye(5))
    torch.testing.assert_close(features.abs().sum(1), torch.full((5,), 3**-0.5))
    assert (features != 0).sum(1).tolist() == [1] * 5
    assert sorted((features != 0).sum(0).tolist()) == [2, 3]


@settings(deadline=None, max_examples=30)
@given(st.integers(65, 400), st.integers(0, 1000))
def test_squared_distances_shrink_by_the_number_of_layers(width: int, seed: int) -> None:
    """Over 200 foldings the mean square of a folded vector is |x|^2 / layers, within 20 %."""
    x = torch.randn(1, width, generator=torch.Generator().manual_seed(seed)).clamp(-5, 5)
    folded = [Folding(width, 64, draw).features(unit(width), x) for draw in range(200)]
    mean = torch.stack([f.square().sum() for f in folded]).mean()
    expected = x.square().sum() / -(-width // 64)
    assert 0.8 < float(mean / expected) < 1.2
