# SPDX-License-Identifier: Apache-2.0
"""The partition by user: whole users, clients of about equal size."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedfusion_flwr.data.partition import Partition, PartitionError, make_partition
from tests.data.partition.small import FAST, same, sizes, spec_of


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
