# SPDX-License-Identifier: Apache-2.0
"""Where the VAE starts: groups, corners, and memberships in a hull."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment, nnls
from sklearn.metrics import adjusted_rand_score
from torch import Tensor

from fedfusion_flwr.fusion.initialization import (
    agreement,
    archetypes,
    clear_groups,
    hull_memberships,
    project_to_simplex,
)
from tests.fusion.tensors import f64, many

pytestmark = pytest.mark.rounding


def normal(seed: int, *shape: int) -> Tensor:
    return torch.as_tensor(np.random.default_rng(seed).normal(size=shape))


# --- the simplex ----------------------------------------------------------------------------------


def nearest_by_brute_force(row: Tensor) -> Tensor:
    """On every face take off the same from all coordinates; the nearest feasible point of all."""
    candidates = []
    for size in range(1, len(row) + 1):
        for face in map(list, combinations(range(len(row)), size)):
            point = torch.zeros_like(row)
            point[face] = row[face] - (row[face].sum() - 1) / size
            if point.min() >= 0:
                candidates.append(point)
    return min(candidates, key=lambda point: float((point - row).square().sum()))


@many
@given(st.lists(st.floats(-3, 3), min_size=1, max_size=5))
def test_projection_is_the_nearest_point_of_the_simplex(row: list[float]) -> None:
    found = project_to_simplex(f64(row))[0]
    torch.testing.assert_close(found, nearest_by_brute_force(f64(*row)), rtol=0, atol=1e-12)


def test_hull_memberships_of_points_inside_and_outside_a_triangle() -> None:
    """Beyond a corner, the corner; beyond an edge, its nearest point."""
    corners = f64([0, 0], [4, 0], [0, 4])
    x = f64([1, 2], [-1, -1], [2, -3], [9, -1])
    expected = f64([0.25, 0.25, 0.5], [1, 0, 0], [0.5, 0.5, 0], [0, 1, 0])
    torch.testing.assert_close(hull_memberships(x, corners), expected, rtol=0, atol=1e-3)


@pytest.mark.parametrize("seed", range(5))
def test_hull_memberships_are_the_constrained_least_squares(seed: int) -> None:
    """Against non-negative least squares with a heavy row for the sum."""
    corners, x = normal(seed, 4, 6), normal(100 + seed, 10, 6)
    heavy = 1e4
    design = np.vstack([corners.T.numpy(), np.full((1, 4), heavy)])
    expected = [nnls(design, np.append(row.numpy(), heavy))[0] for row in x]
    found = hull_memberships(x, corners)
    torch.testing.assert_close(found, torch.as_tensor(np.array(expected)), rtol=0, atol=5e-3)


# --- archetypes -----------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_archetypes_are_the_planted_corners(seed: int) -> None:
    """Among 30 mixtures of four components there is one client of each alone."""
    rng = np.random.default_rng(seed)
    b = torch.as_tensor(np.concatenate([rng.dirichlet([1] * 4, 30), np.eye(4)]))
    corners = f64([0, 0, 0], [3, 0, 0], [0, 3, 0], [0, 0, 3]) + 0.5 * normal(seed, 4, 3)
    found = archetypes(b @ corners, 4)
    rows, columns = linear_sum_assignment((b.T @ found).numpy(), maximize=True)
    assert rows.tolist() == [0, 1, 2, 3]
    torch.testing.assert_close(found[:, columns], b, rtol=0, atol=0.05)


def test_there_are_no_more_archetypes_than_clients_span() -> None:
    assert archetypes(f64([0, 0], [1, 0], [2, 0], [4, 0]), 4).shape == (4, 2)


# --- groups ---------------------------------------------------------------------------------------


def test_planted_groups_are_found_the_largest_first() -> None:
    sizes = [5, 12, 8]
    labels = torch.repeat_interleave(torch.arange(3), torch.tensor(sizes))
    found = clear_groups(5 * torch.eye(3).double()[labels] + 0.5 * normal(0, 25, 3), 8)
    assert found is not None
    assert adjusted_rand_score(labels, found) == 1.0
    assert torch.bincount(found).tolist() == [12, 8, 5]


def test_mixtures_are_no_groups() -> None:
    b = np.random.default_rng(0).dirichlet([1] * 4, 60)
    assert clear_groups(torch.as_tensor(b) @ torch.eye(4).double(), 8) is None
    assert clear_groups(normal(0, 50, 3), 8) is None
    assert clear_groups(normal(0, 2, 3), 8) is None


def far_group() -> tuple[Tensor, Tensor]:
    """Groups at 0, 1 and 9: the silhouette is best for "9 against the rest", .95, then .91."""
    labels = torch.arange(30) % 3
    x = f64([0, 0], [1, 0], [9, 0])[labels] + 0.08 * normal(0, 30, 2)
    return x, labels


def test_a_group_far_off_does_not_hide_two_others() -> None:
    x, labels = far_group()
    found = clear_groups(x, 6)
    assert found is not None
    assert adjusted_rand_score(labels, found) == 1.0


def test_an_earlier_number_of_groups_stays_where_it_scores_as_well() -> None:
    """Two score better than three here, and four worse."""
    x, _ = far_group()
    counts = [int(clear_groups(x, 6, earlier).max()) + 1 for earlier in (2, 3, 4)]  # type: ignore[union-attr]
    assert counts == [2, 3, 3]


def test_thousands_of_clients_join_the_groups_of_a_sample() -> None:
    labels = torch.arange(2500) % 4
    found = clear_groups(6 * torch.eye(4).double()[labels] + 0.5 * normal(0, 2500, 4), 8)
    assert found is not None
    assert agreement(labels, found) == 1.0


def test_thousands_of_mixtures_get_memberships_in_the_corners_of_a_sample() -> None:
    b = torch.as_tensor(np.random.default_rng(0).dirichlet([0.3] * 3, 5000))
    found = archetypes(b @ f64([0, 0], [3, 0], [0, 3]), 3)
    _, columns = linear_sum_assignment((b.T @ found).numpy(), maximize=True)
    assert float((found[:, columns] - b).abs().sum(1).mean()) / 2 < 0.02
