# SPDX-License-Identifier: Apache-2.0
"""Every strategy through `flwr run`, as parts of one run: four clients, clean artifacts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from fedfusion_flwr import protocol
from fedfusion_flwr.strategies import registry
from fedfusion_flwr.tracking import state_digest
from tests.engine.harness import Engine, EngineRun
from tests.runs import run_in_process

pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.timeout(1800)]

CLIENTS, ROUNDS = 4, 3
CONFIG: dict[str, Any] = {
    "num-server-rounds": ROUNDS,
    "num-clients": CLIENTS,
    "train-examples": 800,
    "test-examples": 200,
    "planted-components": 4,
    "batch-size": 64,
    "evaluate-every": ROUNDS,
    "num-clusters": 2,
    "warmup-rounds": 1,
    "cluster-round": 1,
    "pretrain-steps": 5,
}
STRATEGIES = [name for name in registry() if name != "fedma"]
ONE_PASS: dict[str, Any] = {
    "strategy": "fedma",
    "num-server-rounds": 5,
    "num-clients": CLIENTS,
    "partition": "iid",
    "matching-gamma": 7.0,
    "fraction-evaluate": 1.0,
}
TOO_FEW = {"num-clients": 10, "node-timeout": 1.0}
SAYS = {
    "ifca": "IFCA: 2 models, 1 rounds of warm-up",
    "fedgroup": "FedGroup: 2 groups, cold start of 5 steps",
    "fedcluster-cycling": "FedCluster by cycling: 2 clusters in turn",
    "fedprox": "FedProx: mu 0.01",
    "fedbn": "FedBN: each client's own BatchNorm layers",
    "fesem": "FeSEM: 2 centres, warm start on",
    "fedcluster": "FedCluster: after round 1, ward linkage, cut at 2 clusters",
    "fedfusion": "Fusion: 8 components",
}


@pytest.fixture(scope="module")
def everything(engine: Engine) -> EngineRun:
    parts = {name: {**CONFIG, "strategy": name} for name in STRATEGIES}
    return engine.run_parts({**parts, "one-pass": ONE_PASS, "too-few": TOO_FEW}, supernodes=CLIENTS)


@pytest.mark.parametrize("name", STRATEGIES)
def test_three_rounds_leave_clean_artifacts(
    everything: EngineRun, tmp_path: Path, name: str
) -> None:
    done = everything.part(name)
    assert done.status == "finished:completed", done.log[-3000:]
    assert SAYS.get(name, "Served model: average decay") in done.log

    metrics = done.metrics()
    assert [row["round"] for row in metrics] == list(range(ROUNDS + 1))
    for row in metrics[1:]:
        assert row["replies-dropped"] == 0
        assert "round-failed" not in row
        assert row["bytes-down"] > 0 < row["bytes-up"]
        assert row["client-steps"] > 0
        assert row["global-loss"] > 0
    assert [row["round"] for row in metrics if "personalized-accuracy" in row] == [ROUNDS]

    trained = CLIENTS // 2 if name == "fedcluster-cycling" else CLIENTS
    rows = done.clients()
    assert len(rows) == ROUNDS * trained
    assert {row["partition"] for row in rows} == set(range(CLIENTS))
    assert not any("dropped" in row for row in rows)

    summary = json.loads((done.directory / "summary.json").read_text(encoding="utf-8"))
    assert summary["last-round"]["global-accuracy"]["round"] == ROUNDS
    assert summary["last-round"]["personalized-accuracy"]["round"] == ROUNDS
    assert summary["costs"]["bytes-up"] == sum(row.get("bytes-up", 0) for row in metrics)

    final = load_file(done.directory / "final_model.safetensors")
    assert state_digest(final) == done.digest
    if name in ("fesem", "ifca", "fedcluster", "fedgroup"):
        stored = load_file(done.directory / "final_models.safetensors")
        models = protocol.unpack_states(stored)
        assert 1 <= len(models) <= 2
        assert all(model.keys() == final.keys() for model in models.values())
        assert all("cluster" in row for row in rows if row["round"] == ROUNDS)

    # The same without Ray, whatever the order of the replies.
    config = {**CONFIG, "strategy": name, "output-dir": str(tmp_path / "run")}
    assert run_in_process(config).digest == done.digest


def test_one_pass_of_fedma_and_a_round_more(everything: EngineRun) -> None:
    finished = everything.part("one-pass")
    assert finished.status == "finished:completed", finished.log[-3000:]
    assert "the last 1 of 5 rounds do not complete a pass" in finished.log
    metrics = finished.metrics()
    assert [row.get("layer") for row in metrics] == [None, 1, 2, 3, 4, 1]
    assert all(row["replies-valid"] == CLIENTS for row in metrics[1:])
    assert [row["round"] for row in metrics if "personalized-accuracy" in row] == [5]
    assert metrics[4]["global-accuracy"] == metrics[5]["global-accuracy"] > 0.6
    final = load_file(finished.directory / "final_model.safetensors")
    assert len(final["features.0.0.weight"]) == metrics[1]["layer-width"] > 16
    assert state_digest(final) == finished.digest


def test_too_few_nodes_end_the_run_with_the_remedy(everything: EngineRun) -> None:
    alone = everything.part("too-few")
    assert alone.status == everything.status == "finished:failed"
    assert "only 4 of 10 expected clients connected within 1 s" in alone.log
    assert '--federation-config "num-supernodes=10"' in alone.log
