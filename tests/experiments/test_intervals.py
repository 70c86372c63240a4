# SPDX-License-Identifier: Apache-2.0
"""Intervals, by hand and by property."""

from __future__ import annotations

import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedfusion_flwr.experiments.intervals import cluster_bootstrap, t_interval

NUMBERS = st.floats(-100, 100)


def test_t_interval_by_hand() -> None:
    # Mean 2, deviation 1, and 4.302653 is the 97.5 % point of t with two degrees of freedom:
    # half the width is 4.302653 / sqrt(3).
    interval = t_interval([1.0, 2.0, 3.0])
    assert interval is not None
    assert interval.low == pytest.approx(2 - 2.484138, abs=1e-6)
    assert interval.high == pytest.approx(2 + 2.484138, abs=1e-6)


def test_one_value_has_no_interval() -> None:
    assert t_interval([0.5]) is None
    assert cluster_bootstrap([[0.1, 0.2, 0.3]]) is None


def test_bootstrap_draws_whole_clusters() -> None:
    # Two clusters with means 0 and 1: both draws fall on one of them with probability 1/4 each,
    # so the 2.5 % and 97.5 % points are the clusters' own means, however many values are in them.
    interval = cluster_bootstrap([[-1.0, 0.0, 1.0] * 50, [0.0, 1.0, 2.0] * 50])
    assert interval is not None
    assert interval == pytest.approx((0.0, 1.0))


def test_bootstrap_is_the_same_every_time() -> None:
    clusters = [[0.1, 0.2], [0.4], [0.3, 0.5, 0.1]]
    assert cluster_bootstrap(clusters) == cluster_bootstrap(clusters)


@given(st.lists(st.lists(NUMBERS, min_size=1, max_size=4), min_size=2, max_size=5))
def test_bootstrap_lies_between_the_clusters_means(clusters: list[list[float]]) -> None:
    interval = cluster_bootstrap(clusters, draws=50)
    assert interval is not None
    means = [statistics.fmean(cluster) for cluster in clusters]
    assert min(means) - 1e-9 <= interval.low <= interval.high <= max(means) + 1e-9


@given(st.lists(NUMBERS, min_size=2, max_size=9), NUMBERS)
def test_t_interval_moves_with_the_values(values: list[float], shift: float) -> None:
    one, other = t_interval(values), t_interval([value + shift for value in values])
    assert one is not None
    assert other is not None
    assert other == pytest.approx((one.low + shift, one.high + shift), abs=1e-6)
    assert one.low <= statistics.fmean(values) + 1e-9 <= one.high + 2e-9
