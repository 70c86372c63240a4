# SPDX-License-Identifier: Apache-2.0
"""The mixture's sticks: Kumaraswamy fractions, their divergence from a Beta, stick breaking.

What the ELBO is made of comes with its derivatives. All of it is NumPy: on a handful of numbers an
operation of torch takes several times as long.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from scipy.special import betaln, digamma, gammaln, zeta

from fedfusion_flwr.fusion.perceptron import Floats

_EULER_GAMMA = 0.5772156649015329
_SERIES_TERMS = 11
TINY = 1e-6
"""Fractions and shares stay this far from 0, and noise and fractions from 1."""


class WithDerivatives(NamedTuple):
    """A function of Kumaraswamy parameters a and c, elementwise, and its derivatives."""

    value: Floats
    by_a: Floats
    by_c: Floats


def kept(values: Floats, low: float, high: float) -> Floats:
    """The numbers, kept in [low, high]; `numpy.clip` takes twice as long for a handful."""
    return np.minimum(np.maximum(values, low), high)


def inside(values: Floats) -> Floats:
    """The numbers, kept in [1e-6, 1 - 1e-6]."""
    return kept(values, TINY, 1 - TINY)


def sample_kumaraswamy(a: Floats, c: Floats, generator: torch.Generator) -> WithDerivatives:
    """Samples v = (1 - u^(1/c))^(1/a), u ~ Uniform(0, 1): in (0, 1), differentiable in a, c.

    A sample that had to be kept in [1e-6, 1 - 1e-6] depends on nothing: its derivatives are 0.
    """
    u = inside(torch.rand(a.shape, generator=generator).double().numpy())
    power = u ** (1 / c)
    rest = inside(1 - power)
    free = rest ** (1 / a)
    v = inside(free)
    moving = v * (v == free)
    by_a = moving * np.log(rest) / -(a * a)
    by_c = moving * (rest == 1 - power) * power * np.log(u) / (a * rest * c * c)
    return WithDerivatives(v, by_a, by_c)


def kumaraswamy_mean(a: Floats, c: Floats) -> Floats:
    """E[v] = c B(1 + 1/a, c)."""
    mean: Floats = c * np.exp(betaln(1 + 1 / a, c))
    return mean


def kumaraswamy_beta_kl(a: Floats, c: Floats, alpha: float) -> WithDerivatives:
    """KL(Kumaraswamy(a, c) || Beta(1, alpha)), elementwise; Nalisnick & Smyth 2017, eq. 10.

    The infinite series is cut after eleven terms, as the paper suggests; the rest, which matters
    for small c, is replaced by its integral, with B(x, c) ~ Gamma(c) (x + (c - 1) / 2)^-c for
    large x. The derivatives are those of the cut series and the integral.
    """
    inverse = 1 / c
    first = -_EULER_GAMMA - digamma(c) - inverse
    share = (a - 1) / a
    # log B(1, alpha) = -log alpha, and zeta(2, c) is the derivative of digamma.
    value = share * first + np.log(a * c / alpha) - (c - 1) * inverse
    by_a = first / (a * a) + 1 / a
    by_c = share * (inverse * inverse - zeta(2, c)) + inverse - inverse * inverse
    if alpha == 1:  # the series' factor is zero
        return WithDerivatives(value, by_a, by_c)

    m = np.arange(1, _SERIES_TERMS + 1)[:, None]
    divisor = m + a * c
    terms = np.exp(betaln(m / a, c)) / divisor
    joint = digamma(m / a + c)
    terms_by_a = terms * ((joint - digamma(m / a)) * m / (a * a) - c / divisor)
    terms_by_c = terms * (digamma(c) - joint - a / divisor)

    start = _SERIES_TERMS + 0.5 + a * c / 2  # the shift that fits both factors
    tail = np.exp(c * np.log(a / start) + gammaln(c)) / c
    tail_by_a = tail * (c / a - c * c / (2 * start))
    tail_by_c = tail * (np.log(a / start) + digamma(c) - a * c / (2 * start) - inverse)

    rest = terms.sum(0) + tail
    factor = (alpha - 1) * c
    return WithDerivatives(
        value + factor * rest,
        by_a + factor * (terms_by_a.sum(0) + tail_by_a),
        by_c + factor * (terms_by_c.sum(0) + tail_by_c) + (alpha - 1) * rest,
    )


def stick_breaking(v: Floats) -> Floats:
    """Fractions v (M-1,) in (0, 1) -> mixture (M,) that sums to 1."""
    pi = np.ones(len(v) + 1)
    np.cumprod(1 - v, out=pi[1:])
    pi[:-1] *= v
    return pi


def stick_breaking_gradient(v: Floats, by_log_pi: Floats) -> Floats:
    """The gradient by the fractions v (M-1,), given that by the log of the mixture, (M,).

    log pi_m = log v_m + sum_{j<m} log(1 - v_j), the last one without its first term.
    """
    behind = by_log_pi[:0:-1].cumsum()[::-1]
    gradient: Floats = by_log_pi[:-1] / v - behind / (1 - v)
    return gradient
