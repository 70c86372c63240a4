# SPDX-License-Identifier: Apache-2.0
"""Texts divided among clients: by user, and by their two labels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedfusion_flwr import RunConfig
from fedfusion_flwr.data import (
    Partition,
    PartitionError,
    central_test_data,
    data_for,
    local_data,
    make_partition,
    partition_for,
)
from tests.data.partitions import FAST, same, sizes, spec_of
from tests.data.tweets import REAL, needs_real, toy_rows, write_tweets


def dealt(users: np.ndarray, num_clients: int, seed: int = 0) -> Partition:
    labels = np.zeros(len(users), dtype=np.int64)
    return make_partition(labels, 1, spec_of("user", num_clients, seed), users)


# --- by user


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


# --- a data set of texts


@pytest.fixture(scope="module")
def tweets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tweets(tmp_path_factory.mktemp("tweets") / "tweets.csv", toy_rows(600, users=40))


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDFUSION_CACHE", str(tmp_path_factory.mktemp("cache")))


def config(root: Path, partition: str, **keys: Any) -> RunConfig:
    keys = {"planted-components": 2, **keys}
    return RunConfig.from_run_config(
        {"dataset": "sentiment140", "data-root": str(root), "partition": partition, **keys}
    )


@pytest.mark.parametrize("kind", ["iid", "dirichlet", "pathological", "shards", "user"])
def test_every_kind_takes_texts(tweets: Path, kind: str) -> None:
    asked = config(tweets, kind, **{"classes-per-client": 1, "dirichlet-alpha": 0.5})
    data, cut = data_for(asked), partition_for(asked)
    drawn = np.concatenate(cut.indices)
    assert len(np.unique(drawn)) == len(drawn)
    # Shards leave out what cannot be divided equally.
    assert len(drawn) == (540 if kind == "shards" else len(data.y_train))
    labels = [set(data.y_train[part].tolist()) for part in cut.indices]
    if kind == "pathological":
        assert all(len(held) == 1 for held in labels)
        assert set().union(*labels) == {0, 1}
    if kind == "user":
        assert data.users is not None
        held = [set(data.users[part].tolist()) for part in cut.indices]
        assert sum(map(len, held)) == len(set(data.users.tolist())) == 40
    local = local_data(asked, 3)
    assert local.x.shape[1:] == data.input_shape
    assert len(local.x) + len(local.x_validation) == len(cut.indices[3])


def test_components_are_the_labels(tweets: Path) -> None:
    asked = config(tweets, "components")
    main = partition_for(asked).main_components
    assert main is not None
    for client in range(10):
        assert set(local_data(asked, client).y.tolist()) == {int(main[client])}
    x, y = central_test_data(asked)
    assert x is data_for(asked).x_test
    assert y is data_for(asked).y_test


def test_more_components_than_labels_are_refused(tweets: Path) -> None:
    with pytest.raises(PartitionError, match="`planted-components` is 3; it must be at most 2"):
        partition_for(config(tweets, "components", **{"planted-components": 3}))


def test_texts_are_not_rotated(tweets: Path) -> None:
    asked = config(tweets, "components", **{"component-transform": "rotate"})
    with pytest.raises(PartitionError, match=r"turns images, .* 'sentiment140' holds texts"):
        partition_for(asked)
    # With another partition the key says nothing.
    partition_for(config(tweets, "iid", **{"component-transform": "rotate"}))


@needs_real
def test_placeholder_users_of_the_100_000_tweets() -> None:
    with pytest.raises(PartitionError, match="just one user, perhaps a placeholder"):
        partition_for(config(REAL, "user"))
