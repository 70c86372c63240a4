# SPDX-License-Identifier: Apache-2.0
"""Tweets through `flwr run`."""

from __future__ import annotations

import csv
import gzip
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from tests.data.tweets import REAL, needs_real, toy_rows, write_tweets
from tests.engine.harness import Engine, EngineRun

pytestmark = [pytest.mark.engine, pytest.mark.slow]

CONFIG: dict[str, Any] = {
    "dataset": "sentiment140",
    "model": "bilstm",
    "num-clients": 4,
    "num-server-rounds": 2,
    "batch-size": 64,
    "learning-rate": 0.2,
    "average-decay": 0.0,
}


def run_tweets(engine: Engine, tweets: Path, **config: Any) -> EngineRun:
    config = {**CONFIG, "data-root": str(tweets), **config}
    finished = engine.run(config, supernodes=4)
    assert finished.status == "finished:completed", finished.log[-3000:]
    valid = [row["replies-valid"] for row in finished.metrics()[1:]]
    assert valid == [4] * config["num-server-rounds"]
    assert (finished.directory / "final_model.safetensors").exists()
    return finished


def test_generated_tweets_by_user(engine: Engine, tmp_path: Path) -> None:
    tweets = write_tweets(tmp_path / "tweets.csv.gz", toy_rows(2000, users=30))
    finished = run_tweets(engine, tweets, partition="user")
    assert finished.metrics()[2]["global-accuracy"] > 0.95


@needs_real
def test_real_tweets(engine: Engine, tmp_path: Path) -> None:
    with gzip.open(REAL, "rt", encoding="latin-1", newline="") as file:
        tweets = write_tweets(tmp_path / "tweets.csv", islice(csv.reader(file), 3000))
    keys = {"batch-size": 32, "vocabulary-size": 3000, "local-epochs": 3, "num-server-rounds": 5}
    finished = run_tweets(engine, tweets, partition="iid", **keys)
    # 300 are held out: guessing stays below 0.6 by three standard deviations.
    assert finished.metrics()[-1]["global-accuracy"] > 0.6
