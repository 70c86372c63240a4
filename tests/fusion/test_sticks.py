# SPDX-License-Identifier: Apache-2.0
"""Sampler, mean, divergence and breaking of the mixture's sticks, and their derivatives."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import integrate, special, stats

from fedfusion_flwr.fusion.sticks import (
    TINY,
    Floats,
    WithDerivatives,
    kumaraswamy_beta_kl,
    kumaraswamy_mean,
    sample_kumaraswamy,
    stick_breaking,
    stick_breaking_gradient,
)

SERIES_TERMS = 11
many = settings(deadline=None, max_examples=60)
moderate = st.floats(0.05, 20)


def f64(*values: float) -> Floats:
    return np.array(values, dtype=np.float64)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def slope(function: Callable[[float], float], at: float) -> float:
    """Central difference of a function at a positive number."""
    step = 1e-5 * at
    return (function(at + step) - function(at - step)) / (2 * step)


def assert_derivatives(function: Callable[[Floats, Floats], WithDerivatives], a: float, c: float):
    """The derivatives of a function of sticks are the slopes of its value."""
    found = function(f64(a), f64(c))
    by_a = slope(lambda moved: function(f64(moved), f64(c)).value.item(), a)
    by_c = slope(lambda moved: function(f64(a), f64(moved)).value.item(), c)
    size = abs(found.value.item()) + 1e-6
    assert found.by_a.item() == pytest.approx(by_a, rel=1e-4, abs=1e-5 * size / a)
    assert found.by_c.item() == pytest.approx(by_c, rel=1e-4, abs=1e-5 * size / c)


# --- samples --------------------------------------------------------------------------------------


def test_kumaraswamy_mean_where_it_has_a_closed_form() -> None:
    """a = 1: the mean of Beta(1, c), 1 / (1 + c). c = 1: the mean of Beta(a, 1), a / (a + 1)."""
    c = f64(0.05, 1, 3, 100)
    np.testing.assert_allclose(kumaraswamy_mean(np.ones(4), c), 1 / (1 + c), rtol=1e-12)
    np.testing.assert_allclose(kumaraswamy_mean(c, np.ones(4)), c / (1 + c), rtol=1e-12)


@pytest.mark.parametrize(("a", "c"), [(0.5, 0.5), (2.0, 5.0), (4.0, 0.7), (1.0, 1.0)])
def test_kumaraswamy_samples_follow_the_distribution(a: float, c: float) -> None:
    """F(v) = 1 - (1 - v^a)^c; the sample mean is within four standard errors of the mean."""
    draws = sample_kumaraswamy(np.full(20_000, a), np.full(20_000, c), generator(1)).value
    assert stats.kstest(draws, lambda v: 1 - (1 - v**a) ** c).pvalue > 1e-3
    error = 4 * draws.std() / math.sqrt(len(draws))
    assert draws.mean() == pytest.approx(kumaraswamy_mean(f64(a), f64(c)).item(), abs=error)


def test_extreme_sticks_stay_inside_the_unit_interval() -> None:
    for a, c in ((math.exp(-4), math.exp(6)), (math.exp(6), math.exp(-4))):
        draws = sample_kumaraswamy(np.full(5000, a), np.full(5000, c), generator())
        assert draws.value.min() > 0
        assert draws.value.max() < 1
        kept = (draws.value == TINY) | (draws.value == 1 - TINY)
        assert kept.any()
        assert not draws.by_a[kept].any()
        assert not draws.by_c[kept].any()


@many
@given(moderate, moderate, st.integers(0, 100))
def test_derivatives_of_a_sample_are_its_slopes(a: float, c: float, seed: int) -> None:
    """At the same noise."""
    value = sample_kumaraswamy(f64(a), f64(c), generator(seed)).value.item()
    if 1e-4 < value < 1 - 1e-4:
        assert_derivatives(lambda a, c: sample_kumaraswamy(a, c, generator(seed)), a, c)


# --- divergence -----------------------------------------------------------------------------------


def kl_by_quadrature(a: float, c: float, alpha: float) -> float:
    """E_q[log q - log p] with v = (1 - e^(-l / c))^(1 / a), l ~ Exponential(1)."""

    def integrand(level: float) -> float:
        log_v = (
            np.log1p(-np.exp(-level / c)) / a if level > c else np.log(-np.expm1(-level / c)) / a
        )
        log_q = np.log(a * c) + (a - 1) * log_v - (c - 1) * level / c
        log_p = -special.betaln(1, alpha) + (alpha - 1) * np.log(-np.expm1(log_v))
        return float(np.exp(-level) * (log_q - log_p))

    pieces = ((1e-300, 1e-6), (1e-6, 1e-2), (1e-2, 1), (1, 10), (10, 30))
    return math.fsum(integrate.quad(integrand, *piece, limit=200)[0] for piece in pieces)


def truncated_part(a: float, c: float, alpha: float) -> float:
    """What the series leaves out: (alpha - 1) c sum_{m > 11} B(m / a, c) / (m + a c)."""
    m = np.arange(SERIES_TERMS + 1, 1_000_000)
    tail = np.exp(special.betaln(m / a, c)) / (m + a * c)
    return (alpha - 1) * c * float(tail.sum())


def kl(a: float, c: float, alpha: float) -> float:
    return kumaraswamy_beta_kl(f64(a), f64(c), alpha).value.item()


def test_sticks_equal_to_their_prior_have_no_divergence() -> None:
    """Kumaraswamy(1, 1) and Beta(1, 1) are both uniform."""
    assert kl(1.0, 1.0, 1.0) == pytest.approx(0, abs=1e-15)


def test_uniform_prior_by_hand() -> None:
    """Kumaraswamy(1, c) is Beta(1, c): KL to the uniform is log c - (c - 1) / c."""
    for c in (0.25, 2.0, 40.0):
        assert kl(1.0, c, 1.0) == pytest.approx(math.log(c) - (c - 1) / c, rel=1e-12)


@pytest.mark.parametrize("a", [0.3, 1.0, 3.0])
@pytest.mark.parametrize("c", [0.5, 3.0, 20.0])
def test_divergence_from_the_uniform_prior_is_exact(a: float, c: float) -> None:
    """alpha = 1 needs no series."""
    assert kl(a, c, 1.0) == pytest.approx(kl_by_quadrature(a, c, 1.0), abs=1e-6)


@pytest.mark.parametrize(("a", "c"), [(0.5, 2.0), (1.0, 2.0), (1.0, 5.0), (2.0, 3.0)])
@pytest.mark.parametrize("alpha", [0.5, 2.0, 5.0])
def test_integral_stands_in_for_the_truncated_series(a: float, c: float, alpha: float) -> None:
    """What is left of the error of cutting after eleven terms is less than a quarter of it."""
    left = abs(kl(a, c, alpha) - kl_by_quadrature(a, c, alpha))
    assert left <= 0.25 * abs(truncated_part(a, c, alpha)) + 1e-4


def test_small_sticks_by_hand() -> None:
    """Kumaraswamy(1, c) is Beta(1, c), and KL(Beta(1, c) || Beta(1, s)) = log(c/s) + s/c - 1.

    At c = 0.3, s = 5: log 0.06 + 16.667 - 1 = 12.853; cutting the series alone gave 7.1.
    """
    assert kl(1.0, 0.3, 5.0) == pytest.approx(math.log(0.06) + 5 / 0.3 - 1, rel=0.01)


@many
@given(st.floats(0.02, 50), st.floats(0.02, 50))
def test_divergence_from_the_default_prior_is_never_negative(a: float, c: float) -> None:
    assert kl(a, c, 1.0) >= -1e-9


@many
@given(moderate, moderate, st.sampled_from([0.3, 1.0, 5.0]))
def test_derivatives_of_the_divergence_are_its_slopes(a: float, c: float, alpha: float) -> None:
    assert_derivatives(lambda a, c: kumaraswamy_beta_kl(a, c, alpha), a, c)


# --- breaking -------------------------------------------------------------------------------------


def test_stick_breaking_by_hand() -> None:
    """v = (1/2, 1/4): 1/2, then 1/4 of the rest, then what is left: (1/2, 1/8, 3/8)."""
    assert stick_breaking(f64(0.5, 0.25)).tolist() == [0.5, 0.125, 0.375]
    assert stick_breaking(f64()).tolist() == [1.0]


@many
@given(st.lists(st.floats(1e-6, 1 - 1e-6), max_size=20))
def test_stick_breaking_gives_a_distribution(fractions: list[float]) -> None:
    pi = stick_breaking(f64(*fractions))
    assert pi.shape == (len(fractions) + 1,)
    assert pi.min() >= 0
    assert pi.sum() == pytest.approx(1, abs=1e-12)


def test_gradient_of_stick_breaking_by_hand() -> None:
    """By log pi_2 alone, v = (1/2, 1/4): log pi_2 = log v_2 + log(1 - v_1): (-2, 4)."""
    found = stick_breaking_gradient(f64(0.5, 0.25), f64(0, 1, 0))
    assert found.tolist() == [-2.0, 4.0]


@many
@given(st.lists(st.floats(0.01, 0.99), min_size=1, max_size=6), st.integers(0, 100))
def test_gradient_of_stick_breaking_is_its_slope(fractions: list[float], seed: int) -> None:
    v, by_log_pi = f64(*fractions), np.random.default_rng(seed).normal(size=len(fractions) + 1)
    for number, gradient in enumerate(stick_breaking_gradient(v, by_log_pi)):

        def weighted(moved: float, number: int = number) -> float:
            at = np.array(v)
            at[number] = moved
            return float(by_log_pi @ np.log(stick_breaking(at)))

        assert gradient == pytest.approx(slope(weighted, v[number]), rel=1e-4, abs=1e-4)
