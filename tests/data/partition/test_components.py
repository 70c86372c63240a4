# SPDX-License-Identifier: Apache-2.0
"""Planted components: mixtures, sizes, examples, and turned images."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedfusion_flwr.data.partition import (
    Partition,
    PartitionError,
    PartitionSpec,
    central_components,
    make_partition,
    transform_component,
)
from fedfusion_flwr.data.partition.components import clients_per_component
from tests.data.partition.small import FAST, LABELS, made, sizes, spec_of


def planted(result: Partition) -> tuple[np.ndarray, np.ndarray, tuple[np.ndarray, ...]]:
    """Mixtures, main components, and the examples' components."""
    assert result.mixtures is not None
    assert result.main_components is not None
    assert result.example_components is not None
    return result.mixtures, result.main_components, result.example_components


@FAST
@given(
    num_clients=st.integers(10, 40),
    count=st.integers(1, 10),
    seed=st.integers(0, 99),
    tail=st.sampled_from(["balanced", "long-tailed"]),
)
def test_one_hot_clients(num_clients: int, count: int, seed: int, tail: str) -> None:
    result = made("components", num_clients, seed, planted_components=count, component_sizes=tail)
    mixtures, main, examples = planted(result)
    np.testing.assert_array_equal(mixtures, np.eye(count)[main])
    assert len(set(sizes(result))) == 1
    for client, part in enumerate(result.indices):
        np.testing.assert_array_equal(LABELS[part] * count // 10, main[client])
        np.testing.assert_array_equal(examples[client], main[client])
    per_component = np.bincount(main, minlength=count)
    assert per_component.min() >= 1
    assert (np.diff(per_component) <= 0).all()
    if tail == "balanced":
        assert np.ptp(per_component) <= 1


@FAST
@given(
    num_clients=st.integers(5, 40),
    mixing=st.sampled_from([1e-3, 0.1, 1.0, 1e6]),
    transform=st.sampled_from(["none", "rotate"]),
    seed=st.integers(0, 99),
)
def test_mixed_clients(num_clients: int, mixing: float, transform: str, seed: int) -> None:
    result = made(
        "components", num_clients, seed, component_mixing=mixing, component_transform=transform
    )
    mixtures, main, examples = planted(result)
    np.testing.assert_allclose(mixtures.sum(1), 1)
    assert (mixtures >= 0).all()
    assert np.ptp(np.bincount(main, minlength=5)) <= 1
    (size,) = set(sizes(result))
    for client, part in enumerate(result.indices):
        realized = np.bincount(examples[client], minlength=5)
        # Ten cells of (component, class) at most, each rounded by less than one example.
        assert np.abs(realized - size * mixtures[client]).max() < 10
        if transform == "none":
            np.testing.assert_array_equal(LABELS[part] * 5 // 10, examples[client])


def test_all_examples_are_used_where_they_divide() -> None:
    # 10 clients, 2 for each of 5 components of 2 classes: 2 * 40 / 2 = 40 each.
    assert sizes(made("components", 10)) == [40] * 10
    # All classes for everyone: 400 / 40.
    rotated = made("components", 40, planted_components=4, component_transform="rotate")
    assert sizes(rotated) == [10] * 40
    # 400 / 27 = 14.8: 14 each, although 14 is no multiple of the 10 classes.
    rotated = made("components", 27, planted_components=4, component_transform="rotate")
    assert sizes(rotated) == [14] * 27


def test_the_scarcest_class_limits_everyone() -> None:
    labels = np.array([0] * 100 + [1] * 6)
    spec = PartitionSpec("components", 4, 0, planted_components=2)
    # Two clients have class 1 only, with 6 examples.
    assert sizes(make_partition(labels, 2, spec)) == [3] * 4


@pytest.mark.parametrize(
    ("clients", "count", "tail", "expected"),
    [
        (7, 3, "balanced", [3, 2, 2]),
        (14, 3, "long-tailed", [8, 4, 2]),
        # Exactly 2.86, 1.43, .71 of 5; 2.58, 1.29, .65, .32, .16 of 5.
        (5, 3, "long-tailed", [3, 1, 1]),
        (5, 5, "long-tailed", [1] * 5),
    ],
)
def test_component_sizes(clients: int, count: int, tail: Any, expected: list[int]) -> None:
    assert clients_per_component(clients, count, tail).tolist() == expected


def test_client_order_hides_the_component() -> None:
    _, main, _ = planted(made("components", 20))
    assert (np.diff(main) < 0).any()


@pytest.mark.parametrize(
    ("count", "owners"),
    # Class c belongs to component c * M // 10.
    [(5, [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]), (3, [0] * 4 + [1] * 3 + [2] * 3)],
)
def test_central_components_without_transform(count: int, owners: list[int]) -> None:
    spec = spec_of("components", planted_components=count)
    assert central_components(np.arange(10), 10, spec).tolist() == owners


def test_central_components_with_transform_are_uniform() -> None:
    spec = spec_of("components", planted_components=4, component_transform="rotate")
    shown = central_components(LABELS, 10, spec)
    assert np.bincount(shown, minlength=4).min() > 70
    np.testing.assert_array_equal(shown, central_components(LABELS, 10, spec))


def test_central_components_need_components() -> None:
    with pytest.raises(PartitionError, match="`partition` is 'iid'"):
        central_components(LABELS, 10, spec_of("iid"))


# --- turned images


def test_quarter_turns_are_exact() -> None:
    x = torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]]).repeat(4, 1, 1, 1)
    turned = transform_component(x, np.arange(4), 4, "rotate").tolist()
    assert [image[0] for image in turned] == [
        [[1, 2], [3, 4]],
        [[2, 4], [1, 3]],
        [[4, 3], [2, 1]],
        [[3, 1], [4, 2]],
    ]
    half = transform_component(x, np.array([0, 1, 1, 0]), 2, "rotate")
    assert half[1, 0].tolist() == [[4, 3], [2, 1]]
    assert torch.equal(half[3], x[3])


def test_other_turns_agree_with_quarter_turns_in_direction() -> None:
    # A bright pixel right of the centre goes up when turned counterclockwise by 60, then 120.
    x = torch.full((3, 1, 21, 21), -0.5)
    x[:, 0, 9:12, 16:19] = 2.0
    turned = transform_component(x, np.array([0, 1, 2]), 6, "rotate")
    rows, columns = torch.meshgrid(torch.arange(21.0), torch.arange(21.0), indexing="ij")
    for m, image in enumerate(turned[:, 0]):
        weight = (image + 0.5) / (image + 0.5).sum()
        angle = torch.atan2(10 - (weight * rows).sum(), (weight * columns).sum() - 10)
        assert float(angle.rad2deg()) == pytest.approx(60 * m, abs=2)


def test_uncovered_corners_are_dark() -> None:
    x = torch.full((1, 2, 16, 16), -0.5)
    x[:, :, 6:10, 6:10] = 2.0
    turned = transform_component(x, np.array([1]), 8, "rotate")
    assert turned[0, :, 0, 0].tolist() == pytest.approx([-0.5, -0.5])
    assert turned.min().item() == pytest.approx(-0.5, abs=1e-5)


def test_transform_leaves_its_input_alone() -> None:
    x = torch.randn(6, 1, 8, 8)
    before = x.clone()
    assert transform_component(x, np.zeros(6, dtype=np.int64), 5, "none") is x
    transform_component(x, np.arange(6) % 5, 5, "rotate")
    assert torch.equal(x, before)


def test_rotation_needs_square_images() -> None:
    with pytest.raises(PartitionError, match=r"`component-transform` .* 8x9"):
        transform_component(torch.zeros(1, 1, 8, 9), np.array([0]), 4, "rotate")


def test_transform_needs_a_component_for_each_image() -> None:
    with pytest.raises(ValueError, match=r"shape \(2,\)"):
        transform_component(torch.zeros(2, 1, 8, 8), np.array([0]), 4, "rotate")
