# SPDX-License-Identifier: Apache-2.0
"""Measures of feature bias: by hand, and what must hold for any model."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import Tensor, nn

from fedfusion_flwr.experiments.measures import (
    BIN_EDGES,
    feature_distance,
    histogram,
    histogram_divergence,
    layer_features,
    running_values,
    share_outside,
    statistics_gap,
)
from fedfusion_flwr.fusion import NormalizationStatistics

values = hnp.arrays(np.float64, st.integers(1, 60), elements=st.floats(-3, 3))
seeds = st.integers(0, 2**31 - 1)


def features(seed: int, rows: int = 12, columns: int = 4) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)).double()


def moments(seed: int, channels: int = 5) -> NormalizationStatistics:
    generator = torch.Generator().manual_seed(seed)
    mean, std, shift, scale = torch.randn(4, channels, generator=generator)
    return NormalizationStatistics(mean, std.exp(), shift, scale)


# --- histograms -----------------------------------------------------------------------------------


def test_bins() -> None:
    assert len(BIN_EDGES) == 41
    # A bin holds its lower edge; 2 itself and all beyond are outside.
    shares = histogram(np.array([-2.0, -1.95, -1.9, 1.9, 1.99, 2.0, 2.5, -2.1]), smoothing=1e-12)
    np.testing.assert_allclose(shares[[0, 1, -1]], [0.4, 0.2, 0.4], atol=1e-9)
    assert shares.sum() == pytest.approx(1)
    assert share_outside(np.array([-2.1, -2.0, 0.0, 2.0])) == 0.5


@pytest.mark.parametrize("edge", BIN_EDGES[:-1].tolist())
def test_every_edge_begins_its_bin(edge: float) -> None:
    assert histogram(np.array([edge]))[round(10 * edge) + 20] > 0.7


def test_divergence_by_hand() -> None:
    # Counts (2, 0, ...) against (1, 1, ...), 0.01 each; 38 bins are equal.
    total = 2.4
    expected = (2.01 * math.log(2.01 / 1.01) + 0.01 * math.log(0.01 / 1.01)) / total
    told = histogram_divergence(np.array([0.05, 0.05]), np.array([0.05, 0.15]))
    assert told == pytest.approx(expected)
    # The other way round: shares 1.01 of each against 2.01 and 0.01.
    expected = (1.01 * math.log(1.01 / 2.01) + 1.01 * math.log(1.01 / 0.01)) / total
    told = histogram_divergence(np.array([0.05, 0.15]), np.array([0.05, 0.05]))
    assert told == pytest.approx(expected)


@given(values, values, seeds)
def test_divergence(one: np.ndarray, other: np.ndarray, seed: int) -> None:
    assert histogram_divergence(one, one) == 0
    assert histogram_divergence(one, other) >= -1e-12
    mixed = np.random.default_rng(seed).permutation(one)
    assert histogram_divergence(mixed, other) == histogram_divergence(one, other)


# --- features -------------------------------------------------------------------------------------


@given(seeds, st.integers(2, 6))
def test_permuted_channels_are_the_same_features(seed: int, columns: int) -> None:
    x = features(seed, columns=columns)
    order = torch.randperm(columns, generator=torch.Generator().manual_seed(seed))
    assert feature_distance(x, x) == pytest.approx(0, abs=1e-12)
    assert feature_distance(x, x[:, order]) == pytest.approx(0, abs=1e-12)


@given(seeds, st.floats(0.01, 100), st.floats(-10, 10))
def test_distance_ignores_rotation_scale_and_level(seed: int, scale: float, level: float) -> None:
    x = features(seed)
    rotation, _ = torch.linalg.qr(features(seed + 1, 4, 4))
    assert feature_distance(x, scale * (x @ rotation) + level) == pytest.approx(0, abs=1e-9)


@given(seeds, seeds, st.integers(1, 6), st.integers(1, 6))
def test_distance_is_symmetric_and_bounded(one: int, other: int, c: int, d: int) -> None:
    x, y = features(one, columns=c), features(other, columns=d)
    distance = feature_distance(x, y)
    assert 0 <= distance <= 1
    assert distance == pytest.approx(feature_distance(y, x))
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(one))
    assert distance == pytest.approx(feature_distance(x[order], y[order]))


def test_distance_by_hand() -> None:
    # Uncorrelated columns: nothing in common.
    x = torch.tensor([[1.0], [1.0], [-1.0], [-1.0]])
    y = torch.tensor([[1.0], [-1.0], [1.0], [-1.0]])
    assert feature_distance(x, y) == 1
    # X'X = 4, Y'Y = 4 I, ||Y'X||^2 = 16: CKA = 16 / (4 * 4 sqrt 2) = 1 / sqrt 2.
    assert feature_distance(x, torch.cat([x, y], 1)) == pytest.approx(1 - 1 / math.sqrt(2))
    assert math.isnan(feature_distance(x, torch.ones(4, 2)))
    with pytest.raises(ValueError, match="of 4 and of 3 examples"):
        feature_distance(x, y[:3])


# --- carried and measured statistics --------------------------------------------------------------


@given(seeds, seeds)
def test_gap(one: int, other: int) -> None:
    a, b = moments(one), moments(other)
    gap = statistics_gap(a, b)
    assert 0 <= gap <= 1
    assert gap == pytest.approx(statistics_gap(b, a))
    assert statistics_gap(a, a) == pytest.approx(0, abs=1e-12)
    order = torch.randperm(5, generator=torch.Generator().manual_seed(one))
    assert statistics_gap(permuted(a, order), permuted(b, order)) == pytest.approx(gap)
    moved = [NormalizationStatistics(3 * m.mean + 2, 3 * m.std, m.shift, m.scale) for m in (a, b)]
    assert statistics_gap(*moved) == pytest.approx(gap, abs=1e-5)


def permuted(m: NormalizationStatistics, order: Tensor) -> NormalizationStatistics:
    return NormalizationStatistics(m.mean[order], m.std[order], m.shift[order], m.scale[order])


def test_gap_by_hand() -> None:
    def one(mean: float, std: float) -> NormalizationStatistics:
        rest = torch.zeros(1)
        return NormalizationStatistics(torch.tensor([mean]), torch.tensor([std]), rest, rest)

    # Equal deviations s = 1, means 2 apart: 1 - exp(-4 / 8)
    assert statistics_gap(one(0, 1), one(2, 1)) == pytest.approx(1 - math.exp(-0.5))
    # Equal means, s = 1 and t = 3: 1 - sqrt(6 / 10)
    assert statistics_gap(one(5, 1), one(5, 3)) == pytest.approx(1 - math.sqrt(0.6))
    assert statistics_gap(one(0, 1), one(1000, 1)) == 1


# --- models ---------------------------------------------------------------------------------------


def network(normalization: type[nn.Module] = nn.BatchNorm2d, **options: Any) -> nn.Sequential:
    torch.manual_seed(0)
    first = nn.GroupNorm(1, 3) if normalization is nn.GroupNorm else normalization(3, **options)
    return nn.Sequential(
        nn.Conv2d(1, 3, 3), first, nn.ReLU(), nn.Flatten(), nn.Linear(3 * 4, 2), nn.LayerNorm(2)
    )


def test_features_are_channel_means_of_the_layers_input() -> None:
    model, x = network(), torch.randn(7, 1, 4, 4)
    found = layer_features(model, x.split(3))
    assert list(found) == ["1", "5"]
    with torch.no_grad():
        inside = model[0](x)
        last = model[:5](x)
    torch.testing.assert_close(found["1"], inside.mean((2, 3)).double(), rtol=0, atol=1e-6)
    torch.testing.assert_close(found["5"], last.double(), rtol=0, atol=1e-6)
    assert not model[1]._forward_pre_hooks


def test_a_permuted_network_sees_the_same() -> None:
    """Channels of the convolution and all that follows in another order: the same function."""
    model, other = network(), network()
    order = torch.tensor([2, 0, 1])
    x = torch.randn(20, 1, 4, 4)
    with torch.no_grad():
        for net in (model, other):
            net[1].running_mean.copy_(torch.tensor([0.5, -0.5, 0.0]))
        for name, value in other[0].named_parameters(prefix="0"):
            value.copy_(model.get_parameter(name)[order])
        for value in (*other[1].parameters(), other[1].running_mean, other[1].running_var):
            value.copy_(value[order].clone())
        weight = model[4].weight.reshape(2, 3, 4)[:, order]
        other[4].weight.copy_(weight.reshape(2, 12))
        torch.testing.assert_close(model.eval()(x), other.eval()(x))
    one, two = (list(layer_features(net, [x]).values()) for net in (model, other))
    assert not torch.allclose(one[0], two[0])
    for a, b in zip(one, two, strict=True):
        assert feature_distance(a, b) == pytest.approx(0, abs=1e-9)
    mean, std = running_values(model.state_dict())
    other_mean, other_std = running_values(other.state_dict())
    assert histogram_divergence(mean, other_mean) == 0
    np.testing.assert_array_equal(np.sort(std), np.sort(other_std))


def test_running_values() -> None:
    layer = nn.BatchNorm1d(2)
    layer.running_mean = torch.tensor([1.0, -1.0])
    layer.running_var = torch.tensor([4.0, 0.25])
    mean, std = running_values(layer.state_dict())
    assert mean.tolist() == [1, -1]
    np.testing.assert_allclose(std, [2, 0.5], rtol=1e-4)
