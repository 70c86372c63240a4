# SPDX-License-Identifier: Apache-2.0
"""What is read out of an inference: positions, matched components, true components."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedfusion_flwr.experiments.figures.mixtures import mixtures_picture
from fedfusion_flwr.experiments.inferred import (
    LEAST_CLIENTS,
    MOST_CHANNELS,
    Inferred,
    keep_inferred,
    matched,
    positions,
    true_components,
)
from fedfusion_flwr.experiments.results import Setting


def archive(path: Path, **changed: Any) -> Inferred:
    """Two rounds, three clients, three components of four numbers; client 2 came in round 2."""
    b = np.zeros((2, 3, 3))
    b[0, [0, 1], [2, 2]] = 1
    b[0, 2] = np.nan
    b[1] = [[0.995, 0.0, 0.005], [0, 0, 1], [0.995, 0, 0.005]]
    arrays = {
        "rounds": np.array([1, 2]),
        "clients": np.array([0, 1, 4]),
        "assignments": b,
        "weights": np.zeros((2, 3)),
        "mixture": np.full((2, 3), 1 / 3),
        "inferred_mixture": np.full((2, 3), 1 / 3),
        "components": np.zeros((2, 3, 4)),
        "planted": np.array([1, 0, 1]),
        "statistics": np.arange(12.0).reshape(3, 4),
    } | changed
    np.savez(path / "fusion.npz", **{k: v for k, v in arrays.items() if v is not None})
    return Inferred.read(path / "fusion.npz")


def test_read(tmp_path: Path) -> None:
    run = archive(tmp_path)
    assert run.is_planted
    assert run.main_components.tolist() == [0, 2, 0]
    assert run.occupied == [0, 2]
    # Client 1 is of planted group 0; clients 0 and 4 of group 1.
    assert run.order.tolist() == [1, 0, 2]


def test_runs_of_earlier_versions_can_be_read(tmp_path: Path) -> None:
    run = archive(tmp_path, planted=None, statistics=None)
    assert run.statistics is None
    assert not run.is_planted
    assert run.order.tolist() == [0, 2, 1]


def test_mixtures_are_drawn_side_by_side(tmp_path: Path) -> None:
    """Also from what is kept of a run: clients by planted group, components by the best fit."""
    archive(tmp_path, planted_mixtures=np.array([[0.1, 0.9], [1.0, 0.0], [0.3, 0.7]]))
    keep_inferred(tmp_path, tmp_path / "kept.npz", "digest")
    run = Inferred.read(tmp_path / "kept.npz")
    assert run.planted_mixtures is not None
    picture = mixtures_picture(Setting("", "d", "m", "p"), "title", run, run.planted_mixtures)
    # Planted 0 is inferred 2 and planted 1 is 0; inferred 1 is spare. Clients in the order 1, 0, 4.
    expected = [
        [1, 0, 2, 1.0, 1.0], [1, 1, 0, 0.0, 0.0], [1, 2, 1, 0.0, 0.0],
        [0, 0, 2, 0.1, 0.005], [0, 1, 0, 0.9, 0.995], [0, 2, 1, 0.0, 0.0],
        [4, 0, 2, 0.3, 0.005], [4, 1, 0, 0.7, 0.995], [4, 2, 1, 0.0, 0.0],
    ]  # fmt: skip
    names = ["client", "component", "matched", "planted", "inferred"]
    frame = pd.DataFrame(expected, columns=names)
    pd.testing.assert_frame_equal(picture.numbers, frame, check_dtype=False)
    # (0 + .095 + .295) / 3
    assert "Mean total variation between above and below: 0.13." in picture.caption


def test_planted_components_that_no_component_stands_for(tmp_path: Path) -> None:
    run = archive(tmp_path, assignments=np.ones((2, 3, 1)), planted_mixtures=np.eye(2)[[1, 0, 1]])
    picture = mixtures_picture(Setting("", "d", "m", "p"), "title", run, np.eye(2)[[1, 0, 1]])
    # The one component fits planted 1, which has two of the three clients.
    assert picture.numbers["matched"].isna().tolist() == [True, False] * 3
    assert picture.numbers["inferred"].tolist() == [0.0, 1.0] * 3


def test_matched_by_hand() -> None:
    # Planted 0 lives in component 1, planted 1 mostly in 0; planted 2 in 0 too, which is taken.
    b = np.array([[0, 1, 0], [0, 1, 0], [0.9, 0.1, 0], [0.9, 0.1, 0], [0.8, 0, 0.2]])
    assert matched(np.array([0, 0, 1, 1, 2]), b) == {0: 1, 1: 0, 2: 2}
    # One component for all: it stands for the larger group, and nothing for the other.
    assert matched(np.array([0, 0, 1]), np.array([[0.0, 1.0]] * 3)) == {0: 1}


@given(st.lists(st.integers(0, 3), min_size=1, max_size=12), st.permutations(range(4)))
def test_matched_finds_a_renumbering(planted: list[int], names: list[int]) -> None:
    groups = np.array(planted)
    found = matched(groups, np.eye(4)[np.array(names)[groups]])
    assert found == {m: names[m] for m in set(planted)}


def test_true_components() -> None:
    statistics = np.array([[1.0, 2.0], [3.0, 4.0], [10.0, 20.0]])
    found = true_components(statistics, np.array([1, 1, 0]))
    assert {m: row.tolist() for m, row in found.items()} == {0: [10, 20], 1: [2, 3]}


def test_groups_are_apart_in_both_maps() -> None:
    generator = np.random.default_rng(0)
    groups = np.arange(20) % 2
    statistics = generator.normal(0, 0.1, (20, 8)) + 5 * groups[:, None]
    maps = positions(statistics)
    assert list(maps) == ["PCA", "t-SNE"]
    for points in maps.values():
        assert points.shape == (20, 2)
        centres = [points[groups == g].mean(0) for g in (0, 1)]
        spread = max(points[groups == g].std(0).max() for g in (0, 1))
        assert np.linalg.norm(centres[0] - centres[1]) > 2 * spread
    again = positions(statistics)
    for method, points in maps.items():
        np.testing.assert_array_equal(points, again[method])


@pytest.mark.parametrize("shape", [(4, 1), (5, 3)])
def test_small_maps(shape: tuple[int, int]) -> None:
    values = np.random.default_rng(1).normal(size=shape)
    for points in positions(values).values():
        assert points.shape == (shape[0], 2)
        assert np.isfinite(points).all()
    # Clients that do not differ at all lie in one point.
    (only,) = positions(np.ones(shape)).values()
    assert not only.any()


@pytest.mark.parametrize(("planted", "clients"), [(0, 60), (-1, 60), (0, LEAST_CLIENTS - 1)])
def test_what_is_drawn_of_a_wide_inference_is_little(planted: int, clients: int) -> None:
    generator = np.random.default_rng(0)
    width, rounds = 200, 30
    run = Inferred(
        np.arange(rounds),
        np.arange(clients),
        generator.dirichlet(np.ones(15), (rounds, clients)),
        np.ones((rounds, 15)),
        np.ones((rounds, 15)),
        generator.normal(size=(rounds, 15, 4 * width)).astype(np.float32),
        np.full(clients, planted),
        generator.normal(size=(clients, 4 * width)).astype(np.float32),
    )
    drawn = run.drawn()
    assert list(drawn.maps) == ["PCA", "t-SNE"] * (clients >= LEAST_CLIENTS)
    assert drawn.statistics is not None
    assert drawn.channels is not None
    kept = MOST_CHANNELS if planted >= 0 else 0
    assert drawn.statistics.shape == (clients, 4 * kept)
    assert drawn.components.shape == (1, 15, 4 * kept)
    assert len(drawn.channels) == kept
    assert run.statistics is not None
    for i, channel in enumerate(drawn.channels):
        assert drawn.components[0, 7, 2 * kept + i] == run.components[-1, 7, 2 * width + channel]
        assert drawn.statistics[1, 3 * kept + i] == run.statistics[1, 3 * width + channel]
    # Four digits of many assignments, all digits of few.
    many = run.assignments.size > 20_000
    assert many == (clients == 60)
    assert (drawn.assignments == run.assignments).all() == (not many)
    np.testing.assert_allclose(drawn.assignments, run.assignments, atol=5.1e-5)
