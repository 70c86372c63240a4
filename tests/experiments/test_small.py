# SPDX-License-Identifier: Apache-2.0
"""The suites `small` and `method` run for hours: does every strategy of them run at all?"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fedfusion_flwr.app.local import IN_PROCESS
from fedfusion_flwr.experiments.federated import run_cell
from fedfusion_flwr.experiments.rows import read_rows
from fedfusion_flwr.experiments.suite import load_suite
from tests.data.tweets import toy_rows, write_tweets

pytestmark = pytest.mark.slow

TINY: dict[str, Any] = {
    "num-clients": 5,
    "num-server-rounds": 4,
    "fraction-train": 1.0,
    "partition": "iid",
    "test-examples": 50,
    "vae-steps": 5,
}


CASES = {
    f"{suite}: {cell.strategy} with {cell.model}": (cell.model, cell.config)
    for suite in ("small", "method")
    for cell in load_suite(suite).cells({})
    if cell.dataset != "cifar10"
}
"""Every strategy with LeNet and BiLSTM, once. The backbones are too dear, and tested elsewhere."""


@pytest.mark.parametrize(("model", "config"), CASES.values(), ids=CASES.keys())
def test_runs(model: str, config: dict[str, Any], tmp_path: Path) -> None:
    tiny = {**config, **TINY, "output-dir": str(tmp_path / "run")}
    if model == "bilstm":
        tiny |= {
            "data-root": str(write_tweets(tmp_path / "tweets.csv", toy_rows(300))),
            "train-examples": 150,
            "test-examples": 10,
        }
    else:
        tiny |= {"dataset": "mnist-5k", "train-examples": 300}
    row = run_cell(tiny, IN_PROCESS, cpus=1, gpus=0.0)
    rounds = read_rows(tmp_path / "run" / "metrics.jsonl")[1:]
    assert all(r["replies-dropped"] == 0 for r in rounds)
    assert row["metrics"]["personalized-accuracy"][str(len(rounds))] is not None
