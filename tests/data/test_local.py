# SPDX-License-Identifier: Apache-2.0
"""A data set of texts divided among clients, as a run config asks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedfusion_flwr import RunConfig
from fedfusion_flwr.data import (
    PartitionError,
    central_test_data,
    data_for,
    local_data,
    partition_for,
)
from tests.data.tweets import REAL, needs_real, toy_rows, write_tweets

pytestmark = pytest.mark.usefixtures("cache")


@pytest.fixture(scope="module")
def tweets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tweets(tmp_path_factory.mktemp("tweets") / "tweets.csv", toy_rows(600, users=40))


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
