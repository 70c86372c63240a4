# SPDX-License-Identifier: Apache-2.0
"""Measured noise, and the directions that stand above it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from fedfusion_flwr.fusion import StatisticsMemory
from fedfusion_flwr.fusion.noise import Signals, number_of_signals, signals, whitening
from tests.fusion.tensors import f64

pytestmark = pytest.mark.rounding


def normal(seed: int, *shape: int) -> Tensor:
    return torch.as_tensor(np.random.default_rng(seed).normal(size=shape))


def mean_square(rows: Tensor) -> Tensor:
    return rows.T @ rows / len(rows)


# --- whitening ------------------------------------------------------------------------------------


def test_uncorrelated_noise_is_divided_by_its_root_mean_square() -> None:
    """Squares average (4 + 4) / 4 = 2 and (9 + 9) / 4 = 4.5; nothing to shrink."""
    white = whitening(f64([2, 0], [-2, 0], [0, 3], [0, -3]))
    torch.testing.assert_close(white, torch.diag(f64(2, 4.5) ** -0.5))


def test_correlated_noise_of_very_different_scales_comes_out_with_unit_covariance() -> None:
    mix = (torch.eye(6) + 0.3 * normal(1, 6, 6)) * torch.logspace(-3, 3, 6, dtype=torch.float64)
    residuals = normal(0, 20_000, 6) @ mix
    found = mean_square(residuals @ whitening(residuals))
    torch.testing.assert_close(found, torch.eye(6).double(), rtol=0, atol=0.05)


def test_few_draws_of_wide_noise_are_shrunk_and_keep_their_size() -> None:
    """20 draws of 100 features: without shrinkage new noise would come out far too large."""
    white = whitening(normal(0, 20, 100))
    fresh = normal(1, 1000, 100) @ white
    assert float(fresh.square().mean()) == pytest.approx(1, abs=0.35)


def test_a_feature_that_never_varied_does_not_divide_by_zero() -> None:
    residuals = torch.cat([normal(0, 50, 2), torch.zeros(50, 1)], 1)
    assert whitening(residuals).isfinite().all()


def test_clients_that_repeat_themselves_exactly_have_no_noise_to_weight_by() -> None:
    x, ones = normal(0, 30, 4), torch.ones(30).double()
    silent = signals(x, ones, torch.zeros(60, 4).double(), 3)
    unknown = signals(x, ones, None, 3)
    assert torch.equal(silent.x, unknown.x)
    assert silent.variance.tolist() == [0] * 30


def test_residuals_that_the_memory_collects_have_the_covariance_of_one_rounds_noise() -> None:
    """Whatever the level and the deviations; (1 - 1/K) of it, as the level is a mean of K = 50."""
    memory, mix = StatisticsMemory(), f64([2, 0], [1, 0.5])
    deviation = 5 * normal(2, 50, 2)
    for t in range(11):
        rows = 10 * t + deviation + normal(10 + t, 50, 2) @ mix
        memory.remember(t, dict(enumerate(rows)), dict.fromkeys(range(50), 10))
    assert memory.residuals is not None
    found = mean_square(memory.residuals.double())
    expected = (1 - 1 / 50) * mix.T @ mix
    torch.testing.assert_close(found, expected, rtol=0.15, atol=0.05)


# --- signals --------------------------------------------------------------------------------------


def test_threshold_by_hand() -> None:
    """beta = 1: omega = .56 - .95 + 1.82 + 1.43 = 2.86, times a median of 1 squared: 8.1796."""
    assert number_of_signals(f64(8.2, 8.1, 1, 0.5, 0.1), clients=6, features=5) == 1
    assert number_of_signals(f64(9, 8.2, 1, 0.5, 0.1), clients=6, features=5) == 2


def eigenvalues(x: Tensor) -> Tensor:
    return torch.linalg.svdvals(x - x.mean(0)).square()


@pytest.mark.parametrize(("clients", "features"), [(20, 60), (50, 192), (200, 40)])
def test_planted_spikes_are_counted_and_pure_noise_has_none(clients: int, features: int) -> None:
    found = []
    for seed in range(20):
        noise = normal(seed, clients, features)
        spikes = 1.5 * normal(100 + seed, clients, 3) @ normal(200 + seed, 3, features)
        counted = [number_of_signals(eigenvalues(x), clients, features) for x in (noise, spikes)]
        both = number_of_signals(eigenvalues(noise + spikes), clients, features)
        found.append((counted[0], both))
    assert sum(nothing == 0 for nothing, _ in found) >= 18, found
    assert sum(spiked == 3 for _, spiked in found) >= 18, found


def test_measured_noise_shows_what_loud_features_hide() -> None:
    """Groups differ by 2 in one feature of noise .3; another has noise 30 and no groups."""
    labels = torch.arange(40) % 2
    loud = torch.ones(12).double() * 0.3
    loud[5] = 30
    x = normal(0, 40, 12) * loud
    x[:, 0] += 2.0 * labels
    ones = torch.ones(40).double()

    def separation(found: Signals) -> float:
        first = found.x[:, 0]
        gap = first[labels == 0].mean() - first[labels == 1].mean()
        return abs(float(gap)) / float(first.std())

    deaf = signals(x, ones, None, 5)
    heard = signals(x, ones, normal(1, 400, 12) * loud, 5)
    assert separation(deaf) < 1.0
    assert separation(heard) > 1.7
    assert heard.directions.shape == (12, 1)


def test_variance_is_one_over_the_rounds_where_noise_is_known() -> None:
    x, rounds = normal(0, 30, 4) + 4 * (torch.arange(30) % 2).double().unsqueeze(1), torch.ones(30)
    rounds[0] = 4
    assert signals(x, rounds.double(), None, 3).variance.tolist() == [0] * 30
    found = signals(x, rounds.double(), normal(1, 300, 4), 3)
    assert found.variance.tolist() == [0.25] + [1] * 29


def test_more_directions_than_allowed_are_cut() -> None:
    x = 5 * normal(0, 50, 6) @ normal(1, 6, 40) + normal(2, 50, 40)
    ones = torch.ones(50).double()
    assert signals(x, ones, None, 9).directions.shape == (40, 6)
    assert signals(x, ones, None, 2).directions.shape == (40, 2)


def test_leading_directions_are_scaled_to_root_mean_square_one() -> None:
    """Columns (3, -3) and (1, -1) of two clients: the first alone has root mean square 3."""
    plain = Signals(f64([3, 1], [-3, -1]), torch.eye(2).double(), f64(9, 18))
    found = plain.leading(1)
    assert found.x.tolist() == [[1], [-1]]
    assert found.variance.tolist() == [1, 2]
    torch.testing.assert_close(plain.leading(2).x.square().mean(), torch.tensor(1.0).double())


def test_directions_that_turned_and_swapped_turn_back() -> None:
    features = normal(0, 30, 8)
    earlier = torch.linalg.qr(normal(1, 8, 3))[0]
    turned = earlier @ torch.linalg.qr(normal(2, 3, 3))[0]
    back = Signals(features, turned, torch.zeros(30)).turned_towards(earlier)
    torch.testing.assert_close(back.x, features @ earlier)
