# SPDX-License-Identifier: Apache-2.0
"""Partitions: hand-derived cases and properties of every kind."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedfusion_flwr.data.partition import (
    PartitionError,
    PartitionSpec,
    components,
    make_partition,
)
from tests.data.partitions import (
    FAST,
    KINDS,
    LABELS,
    class_sets,
    made,
    planted,
    same,
    sizes,
    spec_of,
)

FINGERPRINT = """
import sys, hashlib, numpy as np
from fedfusion_flwr.data.partition import PartitionSpec, make_partition
labels, users = np.arange(10).repeat(40), np.arange(400) % 100
for kind in sys.argv[1:]:
    spec = PartitionSpec(
        kind, 12, 7, dirichlet_alpha=0.5, min_partition_size=1, component_mixing=0.3
    )
    indices = make_partition(labels, 10, spec, users).indices
    print(hashlib.sha256(b"|".join(part.tobytes() for part in indices)).hexdigest())
"""


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


@pytest.mark.parametrize("kind", ["iid", "dirichlet", "pathological", "user"])
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
