# SPDX-License-Identifier: Apache-2.0
"""Every strategy through `flwr run`: three rounds, four clients, clean artifacts.

They share one run of an app whose server starts one strategy after the other.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Context, RecordDict
from safetensors.torch import load_file

from client_app import app as client_app
from fedfusion_flwr import protocol
from fedfusion_flwr.app.server import run
from fedfusion_flwr.federation.in_process_grid import InProcessGrid
from fedfusion_flwr.strategies import registry
from fedfusion_flwr.tracking import state_digest
from tests.engine.harness import Engine, EngineRun, copy_of_app

pytestmark = [pytest.mark.engine, pytest.mark.slow]

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
# fed-gn gives the clients another model, so it has a run of its own; so has fedma: test_fedma.py.
TOGETHER = [name for name in registry() if name not in ("fed-gn", "fedma")]
SERVER_APP = f"""
import dataclasses
from pathlib import Path

from flwr.serverapp import ServerApp

from fedfusion_flwr.app.server import run

app = ServerApp()


@app.main()
def main(grid, context):
    # The clients keep the run's own config: they read neither of these two keys.
    for name in {TOGETHER}:
        folder = Path(context.run_config["output-dir"], name)
        config = {{**context.run_config, "strategy": name, "output-dir": str(folder)}}
        run(grid, dataclasses.replace(context, run_config=config))
"""
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
def together(engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> EngineRun:
    app = copy_of_app(tmp_path_factory.mktemp("strategies"))
    (app / "server_app.py").write_text(SERVER_APP, encoding="utf-8")
    return engine.run(CONFIG, app=app, supernodes=CLIENTS)


@pytest.mark.parametrize("name", [*TOGETHER, "fed-gn"])
def test_three_rounds_leave_clean_artifacts(
    engine: Engine, request: pytest.FixtureRequest, tmp_path: Path, name: str
) -> None:
    if name == "fed-gn":
        done = engine.run({**CONFIG, "strategy": name}, supernodes=CLIENTS)
    else:
        done = request.getfixturevalue("together").part(name)
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
    grid = InProcessGrid(client_app, CLIENTS, config, shuffle_replies=True)
    assert run(grid, Context(1, 0, {}, RecordDict(), config)).digest == done.digest
