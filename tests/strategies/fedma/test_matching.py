# SPDX-License-Identifier: Apache-2.0
"""The matching of one layer: gains by hand, choices by brute force, invariants of the result."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedfusion_flwr.strategies.fedma.matching import (
    Matching,
    assignment_gains,
    match_units,
    merge_units,
    new_slots,
)


def match(
    descriptors: list[np.ndarray],
    gamma: float = 1e-3,
    sweeps: int = 5,
    grow: bool = True,
    seed: int = 0,
) -> Matching:
    settings: Any = {"gamma": gamma, "sweeps": sweeps, "grow": grow}
    generator = np.random.default_rng(seed)
    return match_units(dict(enumerate(descriptors)), generator=generator, **settings)


def random_rows(seed: int, *shape: int, std: float = 1.0) -> np.ndarray:
    return std * np.random.default_rng(seed).normal(size=shape)


def shuffled_copies(
    rows: np.ndarray, copies: int, seed: int = 0
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Copies of rows in random orders; the first as it is."""
    generator = np.random.default_rng(seed)
    orders = [np.arange(len(rows))]
    orders += [generator.permutation(len(rows)) for _ in range(copies - 1)]
    return [rows[order] for order in orders], orders


def test_gains_by_hand() -> None:
    """One unit w = (1, 2); one global unit of 2 members of sum (3, 0); J = 4, gamma = 0.4."""
    gains = assignment_gains(
        np.array([[1.0, 2.0]]), np.array([[3.0, 0.0]]), np.array([2]), 4, 0.4, 2
    )
    # ||(4, 2)||^2 / (1 + 3) - ||(3, 0)||^2 / 3 + log(2 / (4 - 2)) = 20 / 4 - 9 / 3 + 0
    # ||(1, 2)||^2 / 2 + 2 log(0.4 / 4) - 2 log r
    first = 2.5 + 2 * math.log(0.1)
    np.testing.assert_allclose(gains, [[2.0, first, first - 2 * math.log(2)]])


def test_popularity_stops_at_ten_members() -> None:
    rows, sums = np.zeros((1, 1)), np.zeros((2, 1))
    gains = assignment_gains(rows, sums, np.array([10, 15]), 20, 1.0, 0)
    np.testing.assert_allclose(gains, [[0.0, 0.0]], atol=1e-12)  # log(10 / (20 - 10)), both


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 3), st.integers(3, 4), st.integers(0, 10**6), st.floats(1e-3, 50))
def test_the_choice_is_the_best_of_all_choices(
    num_rows: int, width: int, seed: int, gamma: float
) -> None:
    sums, rows = random_rows(seed, width, 3), random_rows(seed + 1, num_rows, 3)
    slots = new_slots(num_rows, width)
    gains = assignment_gains(rows, sums, np.ones(width, dtype=np.int64), 2, gamma, slots)
    choice = match([sums, rows], gamma, sweeps=0).units[1]
    best = max(
        sum(gains[line, column] for line, column in enumerate(columns))
        for columns in itertools.permutations(range(gains.shape[1]), num_rows)
    )
    assert gains[np.arange(num_rows), choice].sum() == pytest.approx(best)


@pytest.mark.parametrize(
    ("num_rows", "width", "slots"),
    [(32, 32, 32), (32, 680, 20), (32, 700, 1), (1024, 1024, 1), (60, 0, 60), (900, 800, 100)],
)
def test_new_units_on_offer(num_rows: int, width: int, slots: int) -> None:
    assert new_slots(num_rows, width) == slots


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(1, 6), min_size=1, max_size=5),
    st.integers(0, 10**6),
    st.sampled_from([1e-9, 1e-3, 1.0, 7.0, 100.0]),
    st.integers(0, 3),
)
def test_every_matching_is_one(widths: list[int], seed: int, gamma: float, sweeps: int) -> None:
    descriptors = [random_rows(seed + j, width, 4) for j, width in enumerate(widths)]
    matching = match(descriptors, gamma, sweeps)
    assert max(widths) <= matching.width <= sum(widths)
    assert len(matching.members) == matching.width
    assert matching.members.min() >= 1
    for units, width in zip(matching.units.values(), widths, strict=True):
        assert len(units) == len(set(units.tolist())) == width


def test_the_widest_network_is_the_first() -> None:
    wide = np.diag([5.0, 6.0, 7.0])
    matching = match([wide[:1], wide], gamma=1e-9, sweeps=0)
    assert matching.units[1].tolist() == [0, 1, 2]
    assert matching.units[0].tolist() == [0]


def test_one_network_is_matched_to_itself() -> None:
    units = match([random_rows(0, 9, 4)], gamma=7.0).units[0]
    assert units.tolist() == list(range(9))


@pytest.mark.parametrize(("gamma", "grow"), [(1e-6, True), (7.0, False)])
def test_copies_are_matched_to_each_other(gamma: float, grow: bool) -> None:
    copies, orders = shuffled_copies(random_rows(3, 32, 27, std=0.1), 4)
    matching = match(copies, gamma, grow=grow)
    assert matching.width == 32
    # Unit i of a copy is unit orders[i] of the first: they share a global one.
    for units, order in zip(matching.units.values(), orders, strict=True):
        assert units.tolist() == matching.units[0][order].tolist()


@pytest.mark.parametrize(("copies", "width"), [(4, 38), (16, 47)])
def test_a_large_gamma_adds_needless_units(copies: int, width: int) -> None:
    """The authors' gamma of 7, with rows as small as those of a network: exact copies spread."""
    rows, _ = shuffled_copies(random_rows(0, 32, 27, std=0.1), copies)
    assert match(rows, gamma=7.0).width == width
    assert match(rows, gamma=1e-3).width == 32


def test_sweeps_mend_the_first_matching() -> None:
    """Noisy copies: with sweeps, fewer members of the true units are misplaced."""
    truth = random_rows(1, 12, 6)
    copies, orders = shuffled_copies(truth, 6)
    noisy = [rows + random_rows(10 + j, 12, 6, std=0.6) for j, rows in enumerate(copies)]

    def strays(matching: Matching) -> int:
        """Pairs of networks' units that are one and are not matched."""
        pairs = zip(matching.units.values(), orders, strict=True)
        where = [units[np.argsort(order)] for units, order in pairs]
        return sum(int((a != b).sum()) for a, b in itertools.combinations(where, 2))

    before, after = (strays(match(noisy, 1e-3, sweeps)) for sweeps in (0, 5))
    assert after < before


def test_seed_decides() -> None:
    descriptors = [random_rows(j, 10, 3) for j in range(5)]
    first, again = (match(descriptors, 1.0, seed=4) for _ in range(2))
    assert all((first.units[j] == again.units[j]).all() for j in range(5))


@pytest.mark.parametrize(
    ("shapes", "grow"), [([], True), ([(2, 3), (2, 4)], True), ([(2, 3), (1, 3)], False)]
)
def test_unequal_rows_are_refused(shapes: list[tuple[int, int]], grow: bool) -> None:
    with pytest.raises(ValueError, match="descriptors of one form"):
        match([np.ones(shape) for shape in shapes], grow=grow)


def test_the_mean_is_that_of_the_members() -> None:
    parts = [torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[5.0, 6.0], [7.0, 8.0]])]
    merged = merge_units(parts, [np.array([0, 1]), np.array([2, 0])], 3)
    # Unit 0: (1, 2) and (7, 8). Zero padding would halve the other two.
    assert merged.tolist() == [[4.0, 5.0], [3.0, 4.0], [5.0, 6.0]]
    assert merged.dtype == torch.float32


def test_weighted_mean_by_hand() -> None:
    parts = [torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0])]
    weights = torch.tensor([[3.0, 0.0], [1.0, 5.0]])
    both = [np.array([0, 1])] * 2
    assert merge_units(parts, both, 2, weights).tolist() == [1.5, 4.0]
