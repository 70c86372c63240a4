# SPDX-License-Identifier: Apache-2.0
"""Every strategy through `flwr run`: three rounds, four clients, clean artifacts.

The one that sends several models runs by default. The others are marked slow: ``pytest -m slow``.
"""

from __future__ import annotations

import json
from typing import Any

import pytest
from safetensors.torch import load_file

from fedfusion_flwr import protocol
from fedfusion_flwr.strategies import registry
from fedfusion_flwr.tracking import state_digest
from tests.engine.harness import Engine

pytestmark = pytest.mark.engine

CLIENTS, ROUNDS = 4, 3
CONFIG: dict[str, Any] = {
    "num-server-rounds": ROUNDS,
    "num-clients": CLIENTS,
    "planted-components": 4,
    "batch-size": 64,
    "evaluate-every": ROUNDS,
    "num-clusters": 2,
    "warmup-rounds": 1,
    "cluster-round": 1,
    "pretrain-steps": 5,
    "matching-sweeps": 1,
}
BY_DEFAULT = ("ifca",)
SAYS = {
    "ifca": "IFCA: 2 models, 1 rounds of warm-up",
    "fedgroup": "FedGroup: 2 groups, cold start of 5 steps",
    "fedcluster-cycling": "FedCluster by cycling: 2 clusters in turn",
    "fedprox": "FedProx: mu 0.01",
    "fedbn": "FedBN: BatchNorm layers of each client's own",
    "fesem": "FeSEM: 2 centres, warm start on",
    "fedcluster": "FedCluster: after round 1, ward linkage, cut at 2 clusters",
    "fedfusion": "Fusion: 8 components",
}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(n, marks=[] if n in BY_DEFAULT else pytest.mark.slow)
        for n in registry()
        if n != "fedma"  # a round for every layer: see test_fedma.py
    ],
)
def test_three_rounds_leave_clean_artifacts(engine: Engine, name: str) -> None:
    run = engine.run({**CONFIG, "strategy": name}, supernodes=CLIENTS)
    assert run.status == "finished:completed", run.log[-3000:]
    assert SAYS.get(name, "Served model: average decay") in run.log

    metrics = run.metrics()
    assert [row["round"] for row in metrics] == list(range(ROUNDS + 1))
    for row in metrics[1:]:
        assert row["replies-dropped"] == 0
        assert "round-failed" not in row
        assert row["bytes-down"] > 0 < row["bytes-up"]
        assert row["client-steps"] > 0
        assert row["global-loss"] > 0
    assert [row["round"] for row in metrics if "personalized-accuracy" in row] == [ROUNDS]

    trained = CLIENTS // 2 if name == "fedcluster-cycling" else CLIENTS
    rows = run.clients()
    assert len(rows) == ROUNDS * trained
    assert {row["partition"] for row in rows} == set(range(CLIENTS))
    assert not any("dropped" in row for row in rows)

    summary = json.loads((run.directory / "summary.json").read_text(encoding="utf-8"))
    assert summary["last-round"]["global-accuracy"]["round"] == ROUNDS
    assert summary["last-round"]["personalized-accuracy"]["round"] == ROUNDS
    assert summary["costs"]["bytes-up"] == sum(row.get("bytes-up", 0) for row in metrics)

    final = load_file(run.directory / "final_model.safetensors")
    assert state_digest(final) == run.digest
    if name in ("fesem", "ifca", "fedcluster", "fedgroup"):
        stored = load_file(run.directory / "final_models.safetensors")
        models = protocol.unpack_states(stored)
        assert 1 <= len(models) <= 2
        assert all(model.keys() == final.keys() for model in models.values())
        assert all("cluster" in row for row in rows if row["round"] == ROUNDS)
