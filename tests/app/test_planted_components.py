# SPDX-License-Identifier: Apache-2.0
"""Whole runs of FedFusion find the groups that their clients' data were made of."""

from __future__ import annotations

from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedfusion_flwr.config import RunConfig
from fedfusion_flwr.data import partition_for
from tests.runs import Killed, go_dying, rows, run_in_process

pytestmark = pytest.mark.rounding

SEEDS = range(4)
CONFIG: dict[str, Any] = {
    "dataset": "mnist-5k",
    "train-examples": 600,
    "test-examples": 50,
    "num-clients": 6,
    "num-server-rounds": 12,
    "partition": "components",
    "planted-components": 3,
    "num-components": 4,
    "evaluate-every": 12,
    "central-evaluate-every": 12,
}


def test_planted_components_are_recovered(tmp_path: Path) -> None:
    """In the mean over rounds 5 to 12 and four seeds; in a single round two groups may merge.

    A single round of a single run depends on how the processor rounds; the mean is .99 on
    processors with AMX and under AVX2.
    """
    scores = []
    for seed in SEEDS:
        folder = tmp_path / str(seed)
        run_in_process({**CONFIG, "seed": seed, "output-dir": str(folder)})
        scores.append([row["adjusted-rand-index"] for row in rows(folder, "metrics.jsonl")[5:]])
    assert np.shape(scores) == (len(SEEDS), 8)
    assert np.mean(scores) >= 0.9, scores


MIXED = {**CONFIG, "component-mixing": 0.6, "num-server-rounds": 4, "checkpoint-every": 2}


def check_scores(folder: Path) -> None:
    """The scores of every round are those of ``fusion.npz``, found by trying all orders."""
    with np.load(folder / "fusion.npz") as stored:
        told = {name: stored[name] for name in stored.files}
    mixtures = partition_for(RunConfig.from_run_config(MIXED)).mixtures
    assert mixtures is not None
    planted = told["planted_mixtures"]
    # Clients may be numbered in another order than partitions.
    assert sorted(planted.tolist()) == sorted(mixtures.tolist())
    np.testing.assert_array_equal(planted.argmax(1), told["planted"])
    wide = np.pad(planted, ((0, 0), (0, 1)))
    by_round = {row["round"]: row for row in rows(folder, "metrics.jsonl")}
    assert told["rounds"].tolist() == [1, 2, 3, 4]
    for server_round, b in zip(told["rounds"].tolist(), told["assignments"], strict=True):
        errors = [
            np.mean([sum(max(p - q, 0) for p, q in zip(*pair, strict=True)) for pair in pairs])
            for order in permutations(range(4))
            for pairs in [list(zip(wide, b[:, order], strict=True))]
        ]
        row = by_round[server_round]
        assert row["assignment-error"] == pytest.approx(min(errors))
        clusters = [told["planted"][b.argmax(1) == m].tolist() for m in range(4)]
        occupied = {group for of in clusters for group in of if 2 * of.count(group) > len(of)}
        assert row["occupied-groups"] == len(occupied)


def test_assignments_are_scored_also_after_a_resumption(tmp_path: Path) -> None:
    run_in_process({**MIXED, "output-dir": str(tmp_path / "whole")})
    check_scores(tmp_path / "whole")
    with pytest.raises(Killed):
        go_dying(tmp_path / "cut", dies_in=4, **MIXED)
    go_dying(tmp_path / "cut", **MIXED | {"resume-from": str(tmp_path / "cut")})
    check_scores(tmp_path / "cut")


def test_other_strategies_have_occupied_groups_but_no_assignment_error(tmp_path: Path) -> None:
    run_in_process({**MIXED, "strategy": "ifca", "output-dir": str(tmp_path)})
    for row in rows(tmp_path, "metrics.jsonl")[1:]:
        assert 0 <= row["occupied-groups"] <= 3
        assert "assignment-error" not in row
