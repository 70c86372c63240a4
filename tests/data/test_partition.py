# SPDX-License-Identifier: Apache-2.0
"""Partitions: hand-derived cases, properties of every kind, and requests that cannot be met."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from typing import Any, get_args

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedfusion_flwr.data import components
from fedfusion_flwr.data.partition import (
    Partition,
    PartitionError,
    PartitionKind,
    PartitionSpec,
    local_split,
    make_partition,
    transform_component,
)

LABELS = np.arange(10).repeat(40)
KINDS = get_args(PartitionKind)
FAST = settings(
    max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True
)

FINGERPRINT = """
import sys, hashlib, numpy as np
from fedfusion_flwr.data.partition import PartitionSpec, make_partition
labels = np.arange(10).repeat(40)
for kind in sys.argv[1:]:
    spec = PartitionSpec(
        kind, 12, 7, dirichlet_alpha=0.5, min_partition_size=1, component_mixing=0.3
    )
    indices = make_partition(labels, 10, spec).indices
    print(hashlib.sha256(b"|".join(part.tobytes() for part in indices)).hexdigest())
"""


def spec_of(kind: Any, num_clients: int = 10, seed: int = 0, **fields: Any) -> PartitionSpec:
    fields = {"dirichlet_alpha": 0.5, "min_partition_size": 1, **fields}
    return PartitionSpec(kind, num_clients, seed, **fields)


def made(kind: Any, num_clients: int = 10, seed: int = 0, **fields: Any) -> Partition:
    return make_partition(LABELS, 10, spec_of(kind, num_clients, seed, **fields))


def sizes(result: Partition) -> list[int]:
    return [len(part) for part in result.indices]


def class_sets(result: Partition) -> list[set[int]]:
    return [set(LABELS[part].tolist()) for part in result.indices]


def planted(result: Partition) -> tuple[np.ndarray, np.ndarray, tuple[np.ndarray, ...]]:
    assert result.mixtures is not None
    assert result.main_components is not None
    assert result.example_components is not None
    return result.mixtures, result.main_components, result.example_components


def same(a: Partition, b: Partition) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(a.indices, b.indices, strict=True))


# --- every kind


@pytest.mark.parametrize("kind", KINDS)
@FAST
@given(num_clients=st.integers(5, 30), seed=st.integers(0, 2**40))
def test_parts_are_disjoint_and_repeatable(kind: str, num_clients: int, seed: int) -> None:
    result = made(kind, num_clients, seed)
    assert len(result.indices) == num_clients
    assert min(sizes(result)) >= 1
    drawn = np.concatenate(result.indices)
    assert drawn.dtype == np.int64
    assert len(np.unique(drawn)) == len(drawn)
    assert drawn.min() >= 0
    assert drawn.max() < len(LABELS)
    assert all((np.diff(part) > 0).all() for part in result.indices)
    assert same(result, made(kind, num_clients, seed))
    assert not same(result, made(kind, num_clients, seed + 1))


@pytest.mark.parametrize("kind", ["iid", "dirichlet", "pathological"])
def test_nothing_is_left_out(kind: str) -> None:
    assert sum(sizes(made(kind, 13))) == len(LABELS)


@pytest.mark.parametrize("kind", KINDS)
def test_global_random_state_is_untouched(kind: str) -> None:
    np.random.seed(3)  # noqa: NPY002
    expected = np.random.random()  # noqa: NPY002
    np.random.seed(3)  # noqa: NPY002
    made(kind)
    assert np.random.random() == expected  # noqa: NPY002


def test_partitions_are_the_same_in_a_fresh_process() -> None:
    environment = {**os.environ, "PYTHONHASHSEED": "12345"}
    output = subprocess.run(
        [sys.executable, "-c", FINGERPRINT, *KINDS],
        env={**environment, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    for kind, digest in zip(KINDS, output, strict=True):
        indices = made(kind, 12, 7, component_mixing=0.3).indices
        here = hashlib.sha256(b"|".join(part.tobytes() for part in indices)).hexdigest()
        assert digest == here, kind


# --- Flower's partitioners


def test_iid_is_shuffled_and_equal() -> None:
    result = made("iid", 7)
    assert max(sizes(result)) - min(sizes(result)) <= 1
    assert all(len(classes) >= 8 for classes in class_sets(result))


def test_dirichlet_keeps_the_minimum() -> None:
    assert min(sizes(made("dirichlet", 10, min_partition_size=20))) >= 20


def test_dirichlet_alpha_decides_the_skew() -> None:
    few = made("dirichlet", 5, dirichlet_alpha=0.1)
    many = made("dirichlet", 5, dirichlet_alpha=1e6)
    assert np.mean([len(s) for s in class_sets(few)]) < 8
    # 8 of each class, give or take one by rounding.
    assert sizes(many) == pytest.approx([80] * 5, abs=10)


@FAST
@given(
    num_clients=st.integers(1, 25), classes_per_client=st.integers(1, 10), seed=st.integers(0, 99)
)
def test_pathological_classes(num_clients: int, classes_per_client: int, seed: int) -> None:
    result = made("pathological", num_clients, seed, classes_per_client=classes_per_client)
    held = class_sets(result)
    assert all(len(classes) == classes_per_client for classes in held)
    # Every class is used wherever there is room for it.
    assert len(set().union(*held)) == min(10, num_clients * classes_per_client)


def test_shards_hold_runs_of_the_sorted_labels() -> None:
    # 10 clients * 2 shards of 400 / 20 = 20 examples: each shard is half a class.
    result = made("shards", 10)
    assert sizes(result) == [40] * 10
    assert all(len(classes) <= 2 for classes in class_sets(result))


# --- planted components


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
    # Two clients have class 1 only, of which there are 6.
    assert sizes(make_partition(labels, 2, spec)) == [3] * 4


def test_component_sizes() -> None:
    def counts(*args: Any) -> list[int]:
        return components.clients_per_component(*args).tolist()

    assert counts(7, 3, "balanced") == [3, 2, 2]
    assert counts(14, 3, "long-tailed") == [8, 4, 2]
    # Exactly 2.86, 1.43, .71 of 5; 2.58, 1.29, .65, .32, .16 of 5.
    assert counts(5, 3, "long-tailed") == [3, 1, 1]
    assert counts(5, 5, "long-tailed") == [1] * 5


def test_client_order_hides_the_component() -> None:
    _, main, _ = planted(made("components", 20))
    assert (np.diff(main) < 0).any()


def test_central_components_without_transform_are_the_owners() -> None:
    shown = components.central_components(np.arange(10), 10, spec_of("components"))
    assert shown.tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    # 3 components of 10 classes: 0, 3, 6, 9, 12, ... // 10
    spec = spec_of("components", planted_components=3)
    assert (
        components.central_components(np.arange(10), 10, spec).tolist()
        == [0] * 4 + [1] * 3 + [2] * 3
    )


def test_central_components_with_transform_are_uniform() -> None:
    spec = spec_of("components", planted_components=4, component_transform="rotate")
    shown = components.central_components(LABELS, 10, spec)
    assert np.bincount(shown, minlength=4).min() > 70
    np.testing.assert_array_equal(shown, components.central_components(LABELS, 10, spec))


def test_central_components_need_components() -> None:
    with pytest.raises(PartitionError, match="`partition` is 'iid'"):
        components.central_components(LABELS, 10, spec_of("iid"))


# --- transforms


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


# --- what cannot be done


@pytest.mark.parametrize(
    ("kind", "fields", "message"),
    [
        ("random", {}, "`partition` is 'random'; it must be one of iid, dirichlet"),
        ("iid", {"num_clients": 0}, "`num-clients` is 0; it must be at least 1"),
        ("iid", {"num_clients": 401}, "`num-clients` is 401; it must be at most 400"),
        ("iid", {"seed": -1}, "`seed` is -1"),
        ("dirichlet", {"dirichlet_alpha": 0.0}, "`dirichlet-alpha` is 0.0; it must be from 0.001"),
        ("dirichlet", {"dirichlet_alpha": float("inf")}, "`dirichlet-alpha` is inf"),
        ("dirichlet", {"dirichlet_alpha": float("nan")}, "`dirichlet-alpha` is nan"),
        ("dirichlet", {"min_partition_size": 0}, "`min-partition-size` is 0"),
        (
            "dirichlet",
            {"min_partition_size": 41},
            "`min-partition-size` is 41; it must be at most 40 with `num-clients` 10",
        ),
        (
            "dirichlet",
            {"min_partition_size": 40, "dirichlet_alpha": 0.1},
            "`dirichlet-alpha` 0.1 and `num-clients` 10 .* `min-partition-size` 40",
        ),
        ("pathological", {"classes_per_client": 11}, "`classes-per-client` is 11; .* at most 10"),
        ("pathological", {"classes_per_client": 0}, "`classes-per-client` is 0"),
        (
            "pathological",
            {"num_clients": 300, "classes_per_client": 5},
            "`classes-per-client` 5 and `num-clients` 300",
        ),
        ("shards", {"shards_per_client": 41}, "`shards-per-client` is 41; .* at most 40"),
        ("shards", {"shards_per_client": 0}, "`shards-per-client` is 0"),
        ("components", {"planted_components": 0}, "`planted-components` is 0"),
        (
            "components",
            {"planted_components": 11, "num_clients": 20},
            "`planted-components` is 11; it must be at most 10, .* `component-transform`",
        ),
        ("components", {"num_clients": 4}, "`planted-components` is 5; it must be at most 4"),
        (
            "components",
            {"num_clients": 400, "component_sizes": "long-tailed"},
            "`num-clients` 400 .* lower `num-clients`",
        ),
        ("components", {"component_mixing": -0.1}, "`component-mixing` is -0.1; it must be 0 or"),
        ("components", {"component_sizes": "equal"}, "`component-sizes` is 'equal'"),
        ("components", {"component_transform": "flip"}, "`component-transform` is 'flip'"),
    ],
)
def test_infeasible_requests_name_the_key(kind: str, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(PartitionError, match=message):
        made(kind, **fields)


@pytest.mark.parametrize("labels", [[], [0, 10], [-1, 3]])
def test_wrong_labels_are_refused(labels: list[int]) -> None:
    with pytest.raises(PartitionError, match="labels from 0 to 9"):
        make_partition(np.array(labels, dtype=np.int64), 10, spec_of("iid", 1))


def test_a_missing_class_cannot_be_planted() -> None:
    with pytest.raises(PartitionError, match="too few examples of some class"):
        make_partition(LABELS[40:], 10, spec_of("components"))


def test_keys_of_other_kinds_do_not_matter() -> None:
    assert len(made("iid", 3, classes_per_client=99, planted_components=99).indices) == 3


def test_redraws_are_silent(recwarn: pytest.WarningsRecorder) -> None:
    with pytest.raises(PartitionError):
        made("dirichlet", min_partition_size=40)
    made("pathological", 2, classes_per_client=1)
    assert not [str(w.message) for w in recwarn if "min_partition_size" in str(w.message)]
    assert not [str(w.message) for w in recwarn if "NOT be used" in str(w.message)]


# --- local split


@given(
    count=st.integers(1, 50),
    fraction=st.floats(0, 1, exclude_max=True),
    seed=st.integers(0, 9),
    partition_id=st.integers(0, 9),
)
def test_local_split(count: int, fraction: float, seed: int, partition_id: int) -> None:
    indices = np.arange(1000, 1000 + count)
    train, validation = local_split(indices, fraction, seed, partition_id)
    assert sorted([*train, *validation]) == list(range(count))
    assert len(train) >= 1
    assert (len(validation) >= 1) == (fraction > 0 and count >= 2)
    again = local_split(indices, fraction, seed, partition_id)
    np.testing.assert_array_equal(validation, again[1])


def test_local_split_differs_between_clients_and_seeds() -> None:
    indices = np.arange(100)
    held = [set(local_split(indices, 0.2, *key)[1]) for key in ((0, 0), (0, 1), (1, 0))]
    assert [len(part) for part in held] == [20, 20, 20]
    assert held[0] != held[1]
    assert held[0] != held[2]
    assert held[1] != held[2]


@pytest.mark.parametrize("fraction", [-0.1, 1.0, float("nan")])
def test_local_split_refuses_the_fraction(fraction: float) -> None:
    with pytest.raises(PartitionError, match="validation fraction"):
        local_split(np.arange(5), fraction, 0, 0)


def test_local_split_needs_examples() -> None:
    with pytest.raises(PartitionError, match="Client 3 has no examples"):
        local_split(np.arange(0), 0.1, 0, 3)
