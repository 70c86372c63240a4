# SPDX-License-Identifier: Apache-2.0
"""The app through `flwr run`, Ray and all."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Context, RecordDict
from safetensors.torch import load_file

from client_app import app as client_app
from fedfusion_flwr import RunConfig
from fedfusion_flwr.app.server import RunOutcome, run
from fedfusion_flwr.federation.in_process_grid import InProcessGrid
from fedfusion_flwr.tracking import state_digest
from tests.engine.harness import ROOT, Engine, EngineRun

pytestmark = pytest.mark.engine

ROUNDS = 5
CONFIG: dict[str, Any] = {"num-server-rounds": ROUNDS, "partition": "components"}


def in_process(config: dict[str, Any], folder: Path) -> RunOutcome:
    """The same run without Ray; replies arrive in random order."""
    run_config = {**config, "output-dir": str(folder / "run")}
    context = Context(1, 0, {}, RecordDict(), run_config)
    return run(InProcessGrid(client_app, 10, run_config, shuffle_replies=True), context)


@pytest.fixture(scope="module")
def two_actors(engine: Engine) -> EngineRun:
    return engine.run(CONFIG, cpus_per_client=1)


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


def test_digest_is_the_same_with_one_actor_and_without_ray(
    engine: Engine, two_actors: EngineRun, tmp_path: Path
) -> None:
    # An actor of two CPUs leaves room for just one on this federation's smallest machines.
    one_actor = engine.run(CONFIG, cpus_per_client=2)
    assert one_actor.digest == two_actors.digest

    assert in_process(CONFIG, tmp_path).digest == two_actors.digest


def test_bad_config_fails_before_training_with_one_sentence(engine: Engine) -> None:
    refused = engine.run({"partition": "dirichlet", "dirichlet-alpha": -1.0})
    assert refused.status == "finished:failed"
    sentence = "dirichlet-alpha = -1.0 is not allowed: greater than 0"
    assert sentence in refused.log
    assert "round 0" not in refused.log


def test_too_few_nodes_end_the_run_with_the_remedy(engine: Engine) -> None:
    alone = engine.run({"node-timeout": 3.0}, supernodes=2)
    assert alone.status == "finished:failed"
    assert "only 2 of 10 expected clients connected within 3 s" in alone.log
    assert '--federation-config "num-supernodes=10"' in alone.log


@pytest.fixture(scope="module")
def hostile_app(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the app in which client 3 raises and client 4 sends NaN; with seed 99 all raise."""
    app = tmp_path_factory.mktemp("hostile") / "app"
    app.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE", "server_app.py"):
        shutil.copy(ROOT / name, app / name)
    skip = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "fedfusion_flwr", app / "fedfusion_flwr", ignore=skip)
    # Under a name of its own: an installed client_app would be found before the copy's.
    (app / "hostile_client_app.py").write_text(HOSTILE_CLIENT_APP, encoding="utf-8")
    pyproject = (app / "pyproject.toml").read_text(encoding="utf-8")
    pyproject = pyproject.replace("client_app:app", "hostile_client_app:app")
    pyproject = pyproject.replace('"client_app.py"', '"hostile_client_app.py"')
    (app / "pyproject.toml").write_text(pyproject, encoding="utf-8")
    return app


def test_a_raising_and_a_nan_client_do_not_stop_the_others(
    engine: Engine, hostile_app: Path, tmp_path: Path
) -> None:
    # An IID partition: the honest eight know every class.
    config = {"num-server-rounds": ROUNDS, "partition": "iid"}
    mixed = engine.run(config, app=hostile_app)
    assert mixed.status == "finished:completed", mixed.log[-3000:]
    rows = mixed.metrics()[1:]
    assert all(row["replies-valid"] == 8 for row in rows)
    assert all(row["dropped-error"] == 1 and row["dropped-nonfinite"] == 1 for row in rows)
    assert "client 3 is broken on purpose" in mixed.log
    dropped = {row["client"]: row["dropped"] for row in mixed.clients() if "dropped" in row}
    assert dropped == {3: "error", 4: "nonfinite"}

    # In process, which the digests show to be the same run.
    honest = in_process(config, tmp_path)
    final = honest.result.evaluate_metrics_serverapp[ROUNDS]["global-accuracy"]
    assert isinstance(final, float)
    assert final - rows[-1]["global-accuracy"] < 0.03


def test_failed_rounds_in_a_row_fail_the_run_and_keep_its_artifacts(
    engine: Engine, hostile_app: Path
) -> None:
    stopped = engine.run({"num-server-rounds": ROUNDS, "seed": 99}, app=hostile_app)
    assert stopped.status == "finished:failed"
    assert "stopped after 3 failed rounds in a row" in stopped.log
    assert [row["round"] for row in stopped.metrics()] == [0, 1, 2, 3]
    assert {row["dropped"] for row in stopped.clients()} == {"error"}


HOSTILE_CLIENT_APP = """
from flwr.clientapp import ClientApp
from fedfusion_flwr import protocol
from fedfusion_flwr.app.client import handle_evaluate, handle_query, handle_train

app = ClientApp()
app.evaluate()(handle_evaluate)
app.query()(handle_query)


@app.train()
def train(message, context):
    partition = context.node_config["partition-id"]
    if partition == 3 or context.run_config["seed"] == 99:
        raise RuntimeError(f"client {partition} is broken on purpose")
    reply = handle_train(message, context)
    if partition == 4:
        state = reply.content["arrays"].to_torch_state_dict()
        next(iter(state.values())).view(-1)[0] = float("nan")
        reply.content["arrays"] = protocol.record_from_state(state)
    return reply
"""
