# SPDX-License-Identifier: Apache-2.0
"""A strategy written in one file outside the package, compared by its name."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fedfusion_flwr.experiments.rows import read_rows

pytestmark = pytest.mark.slow

STRATEGY = """
from dataclasses import dataclass

import torch
from fedfusion_flwr import FederatedStrategy


@dataclass(kw_only=True, eq=False, repr=False)
class UniformAverage(FederatedStrategy):
    num_clusters: int = 7

    def advance(self, replies):
        weights = torch.full((len(replies),), 1 / len(replies), dtype=torch.float64)
        update = self.weighted_update(replies, weights)
        update.metrics["clusters-asked-for"] = float(self.num_clusters)
        return update
"""
SUITE = """
name = "own"
keep = ["clients.jsonl"]
[common]
num-clients = 4
num-server-rounds = 2
train-examples = 200
test-examples = 50
num-clusters = 3
[partitions.skewed]
partition = "dirichlet"
dirichlet-alpha = 0.5
[[groups]]
name = "main"
strategies = ["fedavg", "my_strategies:UniformAverage"]
datasets = ["mnist-5k"]
models = ["lenet"]
partitions = ["skewed"]
seeds = [0]
"""


def test_it_stands_in_the_tables_beside_the_others(tmp_path: Path) -> None:
    (tmp_path / "my_strategies.py").write_text(STRATEGY, encoding="utf-8")
    (tmp_path / "own.toml").write_text(SUITE, encoding="utf-8")
    program = [str(Path(sys.executable).with_name("fedfusion")), "compare", "own.toml"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    options = ["--engine", "in-process", "--output", "results"]
    done = subprocess.run(
        [*program, *options], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    rows = {row["strategy"]: row for row in read_rows(tmp_path / "results" / "cells.jsonl")}
    assert rows.keys() == {"fedavg", "my_strategies:UniformAverage"}
    assert rows["fedavg"]["digest"] != rows["my_strategies:UniformAverage"]["digest"]
    table = (tmp_path / "results" / "tables" / "main.md").read_text(encoding="utf-8")
    assert "| my_strategies:UniformAverage |" in table
