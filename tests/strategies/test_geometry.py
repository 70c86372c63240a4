# SPDX-License-Identifier: Apache-2.0
"""Geometry of updates against its definitions."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedfusion_flwr.federation.bounds import difference, inner_product, squared_distance
from fedfusion_flwr.strategies import geometry
from fedfusion_flwr.strategies.geometry import (
    count_different,
    decomposed_cosines,
    gram_matrix,
    principal_coordinates,
)

State = dict[str, Tensor]
FAST = settings(max_examples=60, deadline=None, derandomize=True)
drawn = st.tuples(st.integers(1, 7), st.integers(0, 10**6), st.sampled_from([1e-4, 1.0, 1e3]))


def states_of(case: tuple[int, int, float]) -> tuple[list[State], State]:
    count, seed, scale = case
    generator = torch.Generator().manual_seed(seed)

    def state(step: float) -> State:
        return {
            "a.weight": torch.randn(3, 4, generator=generator) * step,
            "n.running_mean": torch.randn(3, generator=generator) * 1e6,
            "n.num_batches_tracked": torch.tensor(5),
            "b.bias": torch.randn(2, generator=generator) * step,
        }

    return [state(scale) for _ in range(count)], state(1.0)


def vectors(states: list[State], origin: State) -> Tensor:
    """Updates as rows, parameters only."""
    rows = [
        torch.cat([(s[k].double() - origin[k].double()).flatten() for k in ("a.weight", "b.bias")])
        for s in states
    ]
    return torch.stack(rows)


@FAST
@given(drawn)
def test_gram_matrix_holds_the_inner_products_of_the_parameters(
    case: tuple[int, int, float],
) -> None:
    states, origin = states_of(case)
    rows = vectors(states, origin)
    gram = gram_matrix(states, origin)
    largest = float(gram.abs().max())
    torch.testing.assert_close(gram, rows @ rows.T, rtol=1e-9, atol=1e-9 * largest)
    for i, left in enumerate(states):
        assert squared_distance(states[0], left) == pytest.approx(
            float((rows[0] - rows[i]).square().sum())
        )
        for j, right in enumerate(states):
            product = inner_product(difference(left, origin), difference(right, origin))
            assert product == pytest.approx(float(gram[i, j]), rel=1e-9, abs=1e-9 * largest)
    with pytest.MonkeyPatch.context() as small:
        small.setattr(geometry, "_CHUNK", 5)
        torch.testing.assert_close(gram_matrix(states, origin), gram, atol=1e-9 * largest, rtol=0)


@FAST
@given(drawn)
def test_coordinates_keep_all_distances_and_are_those_of_the_singular_value_decomposition(
    case: tuple[int, int, float],
) -> None:
    """The rows' coordinates along the leading right singular vectors, up to each column's sign."""
    rows = vectors(*states_of(case))
    points = principal_coordinates(rows @ rows.T)
    assert points.shape == (len(rows), len(rows))
    scale = float(rows.norm(dim=1).max())
    torch.testing.assert_close(
        torch.cdist(points, points), torch.cdist(rows, rows), rtol=1e-6, atol=1e-5 * scale
    )
    leading = principal_coordinates(rows @ rows.T, 2)
    _, _, right = torch.linalg.svd(rows, full_matrices=False)
    expected = rows @ right[:2].T
    torch.testing.assert_close(leading.abs(), expected.abs(), rtol=1e-5, atol=1e-6 * rows.norm())


@FAST
@given(st.integers(2, 8), st.integers(0, 10**6), st.floats(1e-3, 1e3))
def test_decomposed_cosines_are_those_with_the_left_singular_vectors(
    count: int, seed: int, scale: float
) -> None:
    """As FedGroup's paper computes them, up to the signs of the columns.

    With all dimensions, EDC(i, j)^2 = 2 - 2 cos(D_i, D_j). Common scaling changes nothing.
    """
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(count, 30, generator=generator, dtype=torch.float64)
    unit = torch.nn.functional.normalize(rows)
    everything = decomposed_cosines(rows @ rows.T, count)
    angles = (2 - 2 * unit @ unit.T).clamp_min(0)
    torch.testing.assert_close(torch.cdist(everything, everything) ** 2, angles, atol=1e-9, rtol=0)
    left, _, _ = torch.linalg.svd(rows.T, full_matrices=False)
    embedded = decomposed_cosines(rows @ rows.T, 2)
    torch.testing.assert_close(embedded.abs(), (unit @ left[:, :2]).abs(), atol=1e-8, rtol=1e-8)
    assert embedded.norm(dim=1).max() <= 1 + 1e-9
    scaled = decomposed_cosines(scale**2 * rows @ rows.T, 2)
    torch.testing.assert_close(scaled.abs(), embedded.abs(), atol=1e-7, rtol=1e-7)


def test_rounding_gives_no_direction() -> None:
    """Equal updates, and multiples of one: no coordinate but the first."""
    rows = torch.outer(torch.tensor([1.0, 1.0, 2.0, -1.0]), torch.randn(50)).double()
    points = principal_coordinates(rows @ rows.T)
    assert not points[:, 1:].any()
    torch.testing.assert_close(points[:, 0].abs(), rows.norm(dim=1))


def test_only_parameters_count() -> None:
    states, origin = states_of((2, 4, 1.0))
    assert set(difference(states[0], origin)) == {"a.weight", "b.bias"}
    other = states[0] | {"n.running_mean": torch.zeros(3)}
    assert squared_distance(states[0], other) == 0


@pytest.mark.parametrize(
    ("points", "count"),
    [
        ([[1.0, 0.0], [1.0, 0.0], [1.0, 1e-12]], 1),
        ([[1.0, 0.0], [1.0, 0.01]], 2),
        ([[1e-9, 0.0], [2e-9, 0.0]], 2),
        ([[0.0], [0.0]], 1),
        ([[5.0]], 1),
    ],
)
def test_points_that_differ_by_rounding_are_one(points: list[list[float]], count: int) -> None:
    assert count_different(torch.tensor(points, dtype=torch.float64)) == count
