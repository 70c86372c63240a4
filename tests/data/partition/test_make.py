# SPDX-License-Identifier: Apache-2.0
"""Partitions: hand-derived cases, properties of every kind, and the local split."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedfusion_flwr.data import partition
from fedfusion_flwr.data.partition import Partition, PartitionError, local_split, make_partition
from tests.data.partition.small import (
    FAST,
    KINDS,
    LABELS,
    digest,
    fresh_process,
    made,
    same,
    sizes,
    spec_of,
)

GOLDEN = {
    "iid": "a52932a636baaa64",
    "dirichlet": "9c41948a8611dfef",
    "pathological": "7cf36ddc2923d658",
    "shards": "70fc9058c05a1aa7",
    "components": "aaaa8f80a7fb7006",
}


def class_sets(result: Partition) -> list[set[int]]:
    return [set(LABELS[part].tolist()) for part in result.indices]


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


@pytest.mark.parametrize("kind", GOLDEN)
def test_partitions_never_change(kind: str) -> None:
    """If one must, say so in the changelog: published results would no longer be repeated."""
    assert digest(kind) == GOLDEN[kind]


def test_partitions_are_the_same_in_a_fresh_process() -> None:
    script = "from tests.data.partition.small import *; print(*map(digest, KINDS))"
    assert fresh_process("-c", script).split() == [digest(kind) for kind in KINDS]


def test_imports_point_down() -> None:
    """The spec at the bottom, the kinds above it, and nothing from the rest of `data`."""
    ranks = {"spec": 0, "components": 1, "flower": 1, "make": 2, "__init__": 3}
    folder = Path(partition.__file__).parent
    for name, rank in ranks.items():
        text = (folder / f"{name}.py").read_text(encoding="utf-8")
        imported = re.findall(r"from fedfusion_flwr\.data\.(?:partition\.)?(\w+) import", text)
        assert all(ranks.get(other, rank) < rank for other in imported), name


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
    # Every class is used if there is room for it.
    assert len(set().union(*held)) == min(10, num_clients * classes_per_client)


def test_shards_hold_runs_of_the_sorted_labels() -> None:
    # 10 clients * 2 shards of 400 / 20 = 20 examples: each shard is half a class.
    result = made("shards", 10)
    assert sizes(result) == [40] * 10
    assert all(len(classes) <= 2 for classes in class_sets(result))


def test_redraws_are_silent(recwarn: pytest.WarningsRecorder) -> None:
    with pytest.raises(PartitionError):
        made("dirichlet", min_partition_size=40)
    made("pathological", 2, classes_per_client=1)
    warned = " ".join(str(warning.message) for warning in recwarn)
    assert "min_partition_size" not in warned
    assert "NOT be used" not in warned


# --- whole users, clients of about equal size


def dealt(users: np.ndarray, num_clients: int, seed: int = 0) -> Partition:
    labels = np.zeros(len(users), dtype=np.int64)
    return make_partition(labels, 1, spec_of("user", num_clients, seed), users)


@FAST
@given(
    users=st.lists(st.integers(0, 30), min_size=8, max_size=200),
    num_clients=st.integers(1, 8),
    seed=st.integers(0, 9),
)
def test_users_stay_whole_and_clients_balanced(
    users: list[int], num_clients: int, seed: int
) -> None:
    names = np.array([f"user{n}" for n in users])
    num_clients = min(num_clients, len(set(users)))
    result = dealt(names, num_clients, seed)
    held = [set(names[part].tolist()) for part in result.indices]
    assert sum(len(part) for part in held) == len(set(users))
    assert sum(sizes(result)) == len(users)
    # Whoever got the last of its users had the fewest, and that user's examples are no more than
    # the largest of any user.
    largest = max(np.unique(names, return_counts=True)[1])
    assert max(sizes(result)) - min(sizes(result)) <= largest
    assert same(result, dealt(names, num_clients, seed))


def test_users_by_hand() -> None:
    # Of sizes 5, 3, 3, 2, 1: a | b, then c to the 3, d to the 5 (6 has more), e to the 6 (not 7).
    users = np.array(list("a" * 5 + "b" * 3 + "c" * 3 + "d" * 2 + "e"))
    held = ["".join(sorted(set(users[part].tolist()))) for part in dealt(users, 2).indices]
    assert sorted(held) == ["ad", "bce"]


def test_the_seed_deals_equal_users() -> None:
    results = [dealt(np.arange(40).repeat(3), 4, seed) for seed in range(3)]
    assert sizes(results[0]) == [30] * 4
    # Not the clients are shuffled but who is together.
    groups = [{tuple(part.tolist()) for part in result.indices} for result in results]
    assert groups[0] != groups[1] != groups[2]


def test_order_of_users_does_not_show_in_clients() -> None:
    # Names by falling size: without a tie break the first client would always get the largest.
    users = np.repeat(np.arange(10), np.arange(10, 0, -1))
    firsts = {
        next(k for k, part in enumerate(dealt(users, 4, seed).indices) if 0 in users[part])
        for seed in range(12)
    }
    assert len(firsts) > 1


@pytest.mark.parametrize(
    ("users", "message"),
    [
        (None, "this data set does not say who made its examples; choose another `partition`"),
        ([""] * 20, "`num-clients` 3, .* names just one user, perhaps a placeholder, and every"),
        (["a", "b"] * 10, "`num-clients` 3, .* names 2 users and .* lower `num-clients`"),
    ],
)
def test_users_that_cannot_be_dealt(users: list[str] | None, message: str) -> None:
    labels = np.zeros(20, dtype=np.int64)
    named = None if users is None else np.array(users)
    with pytest.raises(PartitionError, match=message):
        make_partition(labels, 1, spec_of("user", 3), named)


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
    held = {
        tuple(local_split(np.arange(100), 0.2, *key)[1].tolist())
        for key in ((0, 0), (0, 1), (1, 0))
    }
    assert [len(part) for part in held] == [20, 20, 20]


@pytest.mark.parametrize(
    ("count", "fraction", "message"),
    [
        (5, -0.1, "validation fraction"),
        (5, 1.0, "validation fraction"),
        (5, float("nan"), "validation fraction"),
        (0, 0.1, "Client 3 has no examples"),
    ],
)
def test_local_split_refuses(count: int, fraction: float, message: str) -> None:
    with pytest.raises(PartitionError, match=message):
        local_split(np.arange(count), fraction, 0, 3)
