# SPDX-License-Identifier: Apache-2.0
"""Intervals for the mean of a few numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

from fedfusion_flwr.randomness import numpy_generator

LEVEL = 0.95
DRAWS = 10_000


class Interval(NamedTuple):
    """From ``low`` to ``high``."""

    low: float
    high: float


def t_interval(values: Sequence[float], level: float = LEVEL) -> Interval | None:
    """Student's interval for the mean, mean +- t(n - 1) s / sqrt(n); None of a single value.

    It takes the values for independent draws of a normal distribution.
    """
    if len(values) < 2:
        return None
    half = stats.t.ppf((1 + level) / 2, len(values) - 1) * stats.sem(values)
    mean = float(np.mean(values))
    return Interval(mean - float(half), mean + float(half))


def cluster_bootstrap(
    clusters: Sequence[Sequence[float]], level: float = LEVEL, draws: int = DRAWS
) -> Interval | None:
    """Percentile bootstrap interval for the mean of all values, whole clusters drawn at a time.

    Values of one cluster (seeds of one setting) are more alike than those of two; drawing clusters
    does not take them for independent. None for fewer than two clusters.

    Parameters
    ----------
    clusters : sequence of non-empty sequences of float
        Grouped values.
    level : float
        Coverage, in (0, 1).
    draws : int
        Resamples; the generator's seed is fixed.
    """
    if len(clusters) < 2:
        return None
    sums = np.array([sum(cluster) for cluster in clusters])
    sizes = np.array([len(cluster) for cluster in clusters])
    generator = numpy_generator(0, "cluster-bootstrap")
    drawn = generator.integers(len(clusters), size=(draws, len(clusters)))
    means = sums[drawn].sum(1) / sizes[drawn].sum(1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(low), float(high))
