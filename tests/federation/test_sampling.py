# SPDX-License-Identifier: Apache-2.0
"""Cohorts: quotas by hand, unseen clients first, properties of apportionment."""

from __future__ import annotations

import itertools
import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedfusion_flwr.federation.sampling import largest_remainder, random_cohort, stratified_cohort


def generator(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


@pytest.mark.parametrize(
    ("shares", "total", "limits", "quotas"),
    [
        ([0.5, 0.3, 0.2], 10, [9, 9, 9], [5, 3, 2]),
        ([0.5, 0.3, 0.2], 4, [9, 9, 9], [2, 1, 1]),  # 2.0, 1.2, 0.8
        ([0.6, 0.4], 1, [9, 9], [1, 0]),
        ([1.0, 1.0], 3, [9, 9], [2, 1]),  # of equal remainders the lower index wins
        ([0.5, 0.5], 6, [1, 9], [1, 5]),  # what the limit cuts off goes to the other
        ([0.9, 0.1, 0.0], 4, [1, 1, 9], [1, 1, 2]),  # even to one without a share
        ([0.0, 0.0], 4, [9, 9], [2, 2]),
        ([0.7, 0.3], 9, [2, 3], [2, 3]),  # no more than there are
        ([0.7, 0.3], 0, [2, 3], [0, 0]),
        ([], 3, [], []),
        ([0.1] * 10, 10, [1] * 10, [1] * 10),
    ],
)
def test_largest_remainder_by_hand(
    shares: list[float], total: int, limits: list[int], quotas: list[int]
) -> None:
    assert largest_remainder(shares, total, limits) == quotas


seats = st.lists(st.tuples(st.integers(0, 1000), st.integers(0, 30)), min_size=1, max_size=12)


@settings(max_examples=200, deadline=None)
@given(seats, st.integers(0, 200))
def test_largest_remainder_fills_up_within_limits(rows: list[tuple[int, int]], total: int) -> None:
    shares, limits = [s / 1000 for s, _ in rows], [limit for _, limit in rows]
    quotas = largest_remainder(shares, total, limits)
    assert sum(quotas) == min(total, sum(limits))
    assert all(0 <= q <= limit for q, limit in zip(quotas, limits, strict=True))


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 1000), min_size=1, max_size=12), st.integers(0, 200))
def test_largest_remainder_keeps_quota(parts: list[int], total: int) -> None:
    quotas = largest_remainder([float(p) for p in parts], total, [total] * len(parts))
    for part, quota in zip(parts, quotas, strict=True):
        exact = total * part / sum(parts)
        assert math.floor(exact - 1e-6) <= quota <= math.ceil(exact + 1e-6)
    # more of a share never means fewer seats
    by_share = sorted(zip(parts, quotas, strict=True))
    for (small, few), (large, many) in itertools.pairwise(by_share):
        assert few <= many or small == large


def test_quotas_of_a_cohort() -> None:
    component_of = dict.fromkeys(range(6), 0) | dict.fromkeys(range(6, 10), 1) | {10: 2, 11: 2}
    for seed in range(10):
        cohort = stratified_cohort(range(12), 6, component_of, [0.5, 0.2, 0.3], generator(seed))
        assert cohort == sorted(set(cohort))
        # exact 3.0, 1.2, 1.8; the remainder goes to component 2
        assert Counter(component_of[c] for c in cohort) == {0: 3, 1: 1, 2: 2}


def test_component_without_clients_here_gets_no_place() -> None:
    cohort = stratified_cohort(
        [0, 1, 2, 3], 2, {0: 0, 1: 0, 2: 2, 3: 2}, [0.25, 0.5, 0.25], generator()
    )
    assert sorted(cohort)[0] in (0, 1)
    assert sorted(cohort)[1] in (2, 3)


def test_never_seen_come_first() -> None:
    known = dict.fromkeys(range(8), 0)
    assert set(stratified_cohort(range(10), 3, known, [1.0], generator())) >= {8, 9}
    some = stratified_cohort(range(30), 5, known, [1.0], generator())
    assert len(some) == 5
    assert min(some) >= 8


def test_known_clients_that_are_away_are_not_drawn() -> None:
    cohort = stratified_cohort([3, 5], 2, {c: c % 2 for c in range(9)}, [0.9, 0.1], generator())
    assert cohort == [3, 5]


def test_cohorts_are_deterministic_and_vary() -> None:
    draws = [random_cohort(range(50), 7, generator(seed)) for seed in (0, 0, 1)]
    assert draws[0] == draws[1] != draws[2]
    assert random_cohort(list(range(49, -1, -1)), 7, generator(0)) == draws[0]
    component_of = {c: c % 3 for c in range(50)}
    strata = [
        stratified_cohort(range(50), 7, component_of, [0.2, 0.3, 0.5], generator(seed))
        for seed in (0, 0, 1)
    ]
    assert strata[0] == strata[1] != strata[2]


def test_cohort_of_everybody_and_of_nobody() -> None:
    assert random_cohort([4, 2, 9], 10, generator()) == [2, 4, 9]
    assert random_cohort([], 0, generator()) == []
    assert stratified_cohort([4, 2], 10, {2: 0, 4: 0}, [1.0], generator()) == [2, 4]


def test_each_client_is_as_likely_as_the_others() -> None:
    rng = generator()
    counts = Counter(c for _ in range(2000) for c in random_cohort(range(10), 3, rng))
    assert min(counts.values()) > 500  # expected 600, standard deviation 20
    assert max(counts.values()) < 700
