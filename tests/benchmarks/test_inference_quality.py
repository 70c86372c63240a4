# SPDX-License-Identifier: Apache-2.0
"""The comparison of inferences: its scores by hand, and its table from the committed rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import inference_quality as quality
from benchmarks import inferences
from fedfusion_flwr.app.local import run_locally
from fedfusion_flwr.experiments.rows import read_rows
from fedfusion_flwr.fusion.noise import Signals

METHOD = (Path(__file__).parents[2] / "docs" / "method.md").read_text(encoding="utf-8")


def test_scores_by_hand_in_the_best_numbering() -> None:
    planted = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    found = torch.tensor([[0.0, 0.0, 1.0], [0.0, 0.0, 1.0], [0.75, 0.25, 0.0]])
    shown = inferences.scores(found, planted, torch.tensor([1.0, 1.0, 2.0]))
    # Component 2 is the planted 0 and 0 the planted 1: a quarter of the third client is left.
    assert shown["b-error"] == pytest.approx(0.25 / 3)
    # Of all examples the third client has half.
    assert shown["pi-error"] == pytest.approx(0.125)
    assert (shown["occupied"], shown["planted"], shown["adjusted-rand-index"]) == (2, 2, 1.0)


def test_knowing_nothing_of_pure_clients() -> None:
    planted = torch.eye(4).repeat(2, 1)
    shown = inferences.scores(torch.full((8, 4), 0.25), planted, torch.ones(8))
    assert shown["b-error"] == 0.75
    assert (shown["pi-error"], shown["occupied"], shown["planted"]) == (0.0, 1, 4)


def test_each_inference_finds_clear_groups() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = np.arange(30) % 3
    centres = torch.tensor([[9.0, 0.0], [0.0, 9.0], [-9.0, -9.0]], dtype=torch.float64)
    x = centres[labels] + 0.5 * torch.randn(30, 2, generator=generator).double()
    clear = Signals(x, torch.eye(2).double(), torch.full((30,), 0.25))
    planted = torch.eye(3, dtype=torch.float64)[labels]
    for b, error in (
        (inferences.k_means(x), 0.0),
        (inferences.gaussian_mixture(clear), 1e-6),
        (inferences.corners(x), 0.1),
    ):
        assert inferences.scores(b, planted, torch.ones(30).double())["b-error"] <= error


@pytest.mark.usefixtures("small")
def test_what_is_noted_is_what_the_server_remembers(tmp_path: Path) -> None:
    config: dict[str, Any] = {
        "strategy": "benchmarks.inference_quality:NotingFedFusion",
        "dataset": "npz",
        "data-root": "small",
        "num-clients": 6,
        "num-server-rounds": 3,
        "planted-components": 2,
        "batch-size": 8,
        "vae-steps": 5,
        "fraction-evaluate": 0.0,
        "output-dir": str(tmp_path / "run"),
    }
    plain = run_locally({**config, "strategy": "fedfusion", "output-dir": str(tmp_path / "plain")})
    outcome = run_locally(config)
    assert outcome.digest == plain.digest
    assert isinstance(outcome.strategy, quality.NotingFedFusion)
    first, second, third = outcome.strategy.notes
    assert [note.rounds.tolist() for note in (first, third)] == [[1] * 6, [3] * 6]
    assert torch.equal(first.smoothed, first.vectors)
    # The mean of two rounds is also their moving average of rate one half, that of three is not.
    assert torch.allclose(second.smoothed, second.vectors, atol=1e-5)
    newest = 3 * third.vectors - 2 * second.vectors
    assert torch.allclose(third.smoothed, (second.vectors + newest) / 2, atol=1e-5)


def test_the_table_is_made_of_the_committed_rows() -> None:
    rows = read_rows(quality.RESULTS)
    assert {row["job"] for row in rows} == set(quality.JOBS)
    asked = [(number, name) for number in quality.ROUNDS for name in quality.INFERENCES]
    for row in rows:
        assert [(found["round"], found["inference"]) for found in row["answers"]] == asked
        assert row["config"] == {**quality.JOBS[row["job"]], "seed": row["seed"]}
        assert not row["commit"].endswith("-dirty")
    shown = quality.table(rows).splitlines()[2:]
    assert len(shown) == len(quality.JOBS) * len(quality.INFERENCES)
    assert quality.summary(rows) in METHOD
    assert "python benchmarks/inference_quality.py" in METHOD
