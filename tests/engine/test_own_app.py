# SPDX-License-Identifier: Apache-2.0
"""An own app through `flwr run`: data, model, strategy and clients in modules beside ours."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.engine.harness import Engine, EngineRun, copy_of_app
from tests.runs import run_in_process

pytestmark = pytest.mark.engine

ROUNDS = 2
CONFIG: dict[str, Any] = {
    "num-server-rounds": ROUNDS,
    "num-clients": 10,
    "partition": "iid",
    "dataset": "my_data:stripes",
    "model": "my_nets:shallow",
    "batch-size": 8,
    "average-decay": 0.0,
}
MODULES = {
    "my_data": """
import torch
from fedfusion_flwr.data import FederatedData


def stripes(options):
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(1000, 1, 8, 8, generator=generator)
    y = torch.arange(1000) % 2
    x[y == 1, :, ::2] += 1
    return FederatedData("stripes", x, y, x[:400], y[:400], num_classes=2, classes=("no", "yes"))
""",
    "my_nets": """
from torch import nn


def shallow(shape):
    channels, height, width = shape.image
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(channels * height * width, 12),
        nn.BatchNorm1d(12),
        nn.ReLU(),
        nn.Linear(12, shape.num_classes),
    )
""",
    "my_strategies": """
import torch
from fedfusion_flwr import FederatedStrategy


class UniformAverage(FederatedStrategy):
    def advance(self, replies):
        weights = torch.full((len(replies),), 1 / len(replies), dtype=torch.float64)
        return self.weighted_update(replies, weights)
""",
    "my_client_app": """
from flwr.clientapp import ClientApp
from fedfusion_flwr import protocol
from fedfusion_flwr.app.client import handle_evaluate, handle_query, handle_train
from parts import of_part

app = ClientApp()
app.evaluate()(of_part(handle_evaluate))
app.query()(of_part(handle_query))


@app.train()
@of_part
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
""",
}


PARTS: dict[str, dict[str, Any]] = {
    "mixed": CONFIG,
    "all-broken": {**CONFIG, "num-server-rounds": 5, "seed": 99},
    "no-module": {**CONFIG, "dataset": "my_date:stripes"},
    "own-strategy": {
        **CONFIG,
        "strategy": "my_strategies:UniformAverage",
        "partition": "dirichlet",
        "dirichlet-alpha": 1.0,
    },
}


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Client 3 raises and client 4 sends NaN; with seed 99 all raise."""
    folder = tmp_path_factory.mktemp("own")
    app = copy_of_app(folder, MODULES, server="parts:server", client="my_client_app:app")
    with pytest.MonkeyPatch.context() as patch:
        # For runs in this process.
        patch.syspath_prepend(app)
        yield app
    for name in MODULES:
        sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def everything(engine: Engine, app: Path) -> EngineRun:
    return engine.run_parts(PARTS, app=app)


def test_modules_go_into_the_bundle_and_bad_clients_do_not_stop_the_others(
    everything: EngineRun, tmp_path: Path
) -> None:
    mixed = everything.part("mixed")
    assert mixed.status == "finished:completed", mixed.log[-3000:]
    assert (mixed.directory / "classes.txt").read_text(encoding="utf-8") == "no\nyes\n"
    with np.load(mixed.directory / "fusion.npz") as fusion:
        assert fusion["components"].shape[2] == 4 * 12

    rows = mixed.metrics()[1:]
    assert [row["replies-valid"] for row in rows] == [8] * ROUNDS
    assert all(row["dropped-error"] == 1 and row["dropped-nonfinite"] == 1 for row in rows)
    assert "client 3 is broken on purpose" in everything.log
    dropped = {row["client"]: row["dropped"] for row in mixed.clients() if "dropped" in row}
    assert dropped == {3: "error", 4: "nonfinite"}

    # The same with honest clients, in this process.
    outcome = run_in_process({**CONFIG, "output-dir": str(tmp_path / "honest")})
    honest = outcome.result.evaluate_metrics_serverapp[ROUNDS]["global-accuracy"]
    assert isinstance(honest, float)
    assert honest > 0.9
    assert honest - rows[-1]["global-accuracy"] < 0.03


def test_failed_rounds_in_a_row_fail_the_run_and_keep_its_artifacts(everything: EngineRun) -> None:
    stopped = everything.part("all-broken")
    assert stopped.status == everything.status == "finished:failed"
    assert "stopped after 3 failed rounds in a row" in stopped.log
    assert [row["round"] for row in stopped.metrics()] == [0, 1, 2, 3]
    assert {row["dropped"] for row in stopped.clients()} == {"error"}


def test_a_module_that_is_not_beside_the_app_fails_the_run(everything: EngineRun) -> None:
    refused = everything.part("no-module")
    assert refused.status == everything.status == "finished:failed"
    assert "no module 'my_date': put my_date.py beside" in refused.log


def test_a_strategy_beside_the_app_runs_by_name(everything: EngineRun) -> None:
    done = everything.part("own-strategy")
    assert done.status == "finished:completed", done.log[-3000:]
    trained = [row for row in done.clients() if "dropped" not in row]
    assert len({row["num-examples"] for row in trained}) > 1
    assert {row["weight"] for row in trained} == {1 / 8}
