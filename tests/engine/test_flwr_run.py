# SPDX-License-Identifier: Apache-2.0
"""The app through `flwr run`, with Ray."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file

from fedfusion_flwr import RunConfig
from fedfusion_flwr.tracking import state_digest
from tests.engine.harness import ROOT, Engine, EngineRun
from tests.runs import run_in_process

pytestmark = pytest.mark.engine

ROUNDS = 5
CONFIG: dict[str, Any] = {
    "num-server-rounds": ROUNDS,
    "partition": "components",
    "train-examples": 2000,
    "test-examples": 500,
}


@pytest.fixture(scope="module")
def two_actors(engine: Engine) -> EngineRun:
    return engine.run(CONFIG, app=ROOT, actors=2)


def test_run_completes_and_writes_every_artifact(two_actors: EngineRun) -> None:
    assert two_actors.status == "finished:completed", two_actors.log[-3000:]
    metrics = two_actors.metrics()
    assert [row["round"] for row in metrics] == list(range(ROUNDS + 1))
    assert all(row["replies-valid"] == 10 for row in metrics[1:])
    assert metrics[-1]["global-accuracy"] > 0.6 > metrics[0]["global-accuracy"]
    assert all("adjusted-rand-index" in row for row in metrics[1:])
    assert {"sample", "train", "transfer", "infer", "aggregate", "evaluate"} <= set(
        metrics[-1]["seconds"]
    )

    clients = two_actors.clients()
    assert len(clients) == 10 * ROUNDS
    assert {row["partition"] for row in clients} == set(range(10))
    last = [row["weight"] for row in clients if row["round"] == ROUNDS]
    assert sum(last) == pytest.approx(1)

    stored = json.loads((two_actors.directory / "config.json").read_text(encoding="utf-8"))
    assert RunConfig.from_run_config(stored).num_server_rounds == ROUNDS
    with np.load(two_actors.directory / "fusion.npz") as fusion:
        assert fusion["assignments"].shape == (ROUNDS, 10, 8)
        assert fusion["components"].shape == (ROUNDS, 8, 4 * 48)
        np.testing.assert_allclose(fusion["mixture"].sum(1), 1)

    final = load_file(two_actors.directory / "final_model.safetensors")
    assert state_digest(final) == two_actors.digest
    assert (two_actors.directory / "best_model.safetensors").exists()


def test_one_readable_line_a_round(two_actors: EngineRun) -> None:
    lines = [line for line in two_actors.log.splitlines() if f"/{ROUNDS} |" in line]
    assert len(lines) == ROUNDS + 1
    assert "[ROUND" not in two_actors.log
    for part in ("train loss", "test acc", "components", "dropped 0/10", "aggregate"):
        assert part in lines[-1]


def test_digest_is_the_same_without_ray(two_actors: EngineRun, tmp_path: Path) -> None:
    """`test_strategies.py` shows that it is also the same with one actor."""
    config = {**CONFIG, "output-dir": str(tmp_path / "run")}
    assert run_in_process(config).digest == two_actors.digest


def test_bad_config_fails_before_training_with_one_sentence(engine: Engine) -> None:
    refused = engine.run({"partition": "dirichlet", "dirichlet-alpha": -1.0})
    assert refused.status == "finished:failed"
    sentence = "dirichlet-alpha = -1.0 is not allowed: greater than 0"
    assert sentence in refused.log
    assert "round 0" not in refused.log
