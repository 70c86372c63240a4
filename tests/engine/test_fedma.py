# SPDX-License-Identifier: Apache-2.0
"""FedMA through `flwr run`: one pass over LeNet and a round more."""

from __future__ import annotations

import pytest
from safetensors.torch import load_file

from fedfusion_flwr.tracking import state_digest
from tests.engine.harness import Engine

pytestmark = [pytest.mark.engine, pytest.mark.slow]


def test_one_pass(engine: Engine) -> None:
    config = {
        "strategy": "fedma",
        "partition": "iid",
        "num-server-rounds": 5,
        "matching-gamma": 7.0,
        "fraction-evaluate": 1.0,
    }
    finished = engine.run(config)
    assert finished.status == "finished:completed", finished.log[-3000:]
    assert "the last 1 of 5 rounds do not complete a pass" in finished.log
    metrics = finished.metrics()
    assert [row.get("layer") for row in metrics] == [None, 1, 2, 3, 4, 1]
    assert all(row["replies-valid"] == 10 for row in metrics[1:])
    assert [row["round"] for row in metrics if "personalized-accuracy" in row] == [5]
    assert metrics[4]["global-accuracy"] == metrics[5]["global-accuracy"] > 0.6
    final = load_file(finished.directory / "final_model.safetensors")
    assert len(final["features.0.0.weight"]) == metrics[1]["layer-width"] > 16
    assert state_digest(final) == finished.digest
