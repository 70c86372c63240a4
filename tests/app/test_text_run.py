# SPDX-License-Identifier: Apache-2.0
"""Whole runs on tweets, in this process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from fedfusion_flwr.config import ConfigError
from fedfusion_flwr.data import PartitionError
from fedfusion_flwr.errors import FedFusionError
from fedfusion_flwr.models import ModelError
from tests.data.tweets import toy_rows, write_tweets
from tests.runs import rows, run_in_process

TWO_ROUNDS: dict[str, Any] = {
    "dataset": "sentiment140",
    "model": "bilstm",
    "partition": "user",
    "num-clients": 4,
    "num-server-rounds": 2,
    "local-epochs": 3,
    "learning-rate": 0.1,
    "average-decay": 0.0,
}


@pytest.fixture
def tweets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FEDFUSION_CACHE", str(tmp_path / "cache"))
    return write_tweets(tmp_path / "tweets.csv", toy_rows(800, users=30))


def run_here(tweets: Path, folder: str, **config: Any) -> tuple[list[dict[str, Any]], str]:
    """The rows of the metrics, and the digest."""
    directory = tweets.parent / folder
    run_config = {**TWO_ROUNDS, "data-root": str(tweets), "output-dir": str(directory), **config}
    outcome = run_in_process(run_config)
    return rows(directory), outcome.digest


@pytest.mark.parametrize("source", ["local", "probe"])
def test_fedfusion_learns_from_texts(tweets: Path, source: str) -> None:
    keys = {"statistics-source": source}
    metrics, digest = run_here(tweets, "run", **keys)
    assert metrics[0]["global-accuracy"] < 0.8
    assert metrics[2]["global-accuracy"] > 0.95
    assert [row["replies-valid"] for row in metrics[1:]] == [4, 4]
    assert sum(metrics[2]["mixture"]) == pytest.approx(1)
    final = load_file(tweets.parent / "run" / "final_model.safetensors")
    assert not final["embedding.weight"][0].any()
    assert run_here(tweets, "again", **keys)[1] == digest


def test_fused_statistics_in_local_training(tweets: Path) -> None:
    keys = {"local-normalization": "fused", "fused-from-round": 2}
    metrics, _ = run_here(tweets, "run", **keys)
    assert metrics[2]["replies-valid"] == 4
    assert metrics[2]["global-accuracy"] > 0.8


def test_two_classes_are_calibrated_like_many(tweets: Path) -> None:
    keys = {"partition": "dirichlet", "dirichlet-alpha": 0.5, "label-calibration": 1.0}
    metrics, digest = run_here(tweets, "run", **keys, **{"finetune-steps": 2})
    assert metrics[2]["replies-valid"] == metrics[2]["evaluate-replies-valid"] == 4
    assert metrics[2]["global-accuracy"] > 0.8
    assert metrics[2]["personalized-prior-accuracy"] > 0.8
    assert run_here(tweets, "plain", **keys | {"label-calibration": 0.0})[1] != digest


@pytest.mark.parametrize(
    ("keys", "error", "message"),
    [
        ({"model": "lenet"}, ModelError, "'lenet' takes images, but `dataset` holds texts"),
        ({"dataset": "mnist-5k"}, PartitionError, "does not say who made its examples"),
        (
            {"dataset": "mnist-5k", "partition": "iid"},
            ModelError,
            "'bilstm' takes texts, but `dataset` holds images",
        ),
        (
            {"partition": "components", "planted-components": 3},
            PartitionError,
            "`planted-components` is 3; it must be at most 2",
        ),
        (
            {"partition": "components", "planted-components": 2, "component-transform": "rotate"},
            PartitionError,
            "turns images",
        ),
        ({"vocabulary-size": 2}, ConfigError, "vocabulary-size = 2 is not allowed"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_written(
    tweets: Path, keys: dict[str, Any], error: type[FedFusionError], message: str
) -> None:
    with pytest.raises(error, match=message):
        run_here(tweets, "run", **keys)
    assert not (tweets.parent / "run").exists()
