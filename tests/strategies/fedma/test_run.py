# SPDX-License-Identifier: Apache-2.0
"""FedMA with real clients in this process: it learns, repeats itself, and leaves a wide model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import ConfigRecord, Message, RecordDict
from safetensors.torch import load_file

from client_app import app
from fedfusion_flwr import RunConfig, protocol
from fedfusion_flwr.app.server import RunOutcome, central_evaluation
from fedfusion_flwr.data import data_for
from fedfusion_flwr.federation.in_process_grid import InProcessGrid
from fedfusion_flwr.fusion import fuse_state_dicts
from fedfusion_flwr.models import ModelError, model_for
from fedfusion_flwr.models.resize import fit_to_state
from fedfusion_flwr.tracking import state_digest
from tests.runs import rows, run_in_process

CLIENTS = 4
CONFIG: dict[str, Any] = {
    "strategy": "fedma",
    "partition": "iid",
    "num-clients": CLIENTS,
    "num-server-rounds": 4,
    "batch-size": 64,
    "learning-rate": 0.05,
}


def run_here(folder: Path, *, seed: int = 0, **config: Any) -> RunOutcome:
    return run_in_process({**CONFIG, "output-dir": str(folder), **config}, seed)


def accuracy_of_unmatched_mean() -> float:
    """That of the plain mean of differently initialized networks, trained for as many epochs."""
    config = RunConfig.from_run_config({**CONFIG, "local-epochs": 4})
    grid = InProcessGrid(app, CLIENTS, config.to_run_config())
    messages = []
    for k, node in enumerate(grid.nodes):
        state = model_for(config, data_for(config), k + 1).state_dict()
        settings = ConfigRecord({protocol.SERVER_ROUND: 1})
        content = RecordDict({"arrays": protocol.record_from_state(state), "config": settings})
        messages.append(Message(content, node, "train"))
    states = [
        protocol.state_from_record(reply.content.array_records["arrays"])
        for reply in grid.send_and_receive(messages)
    ]
    mean = fuse_state_dicts(states, torch.full((CLIENTS,), 1 / CLIENTS, dtype=torch.float64))
    measured = central_evaluation(config)(1, protocol.record_from_state(mean))
    assert measured is not None
    return float(measured["global-accuracy"])  # type: ignore[arg-type]


@pytest.mark.slow
def test_one_pass_learns_where_a_mean_of_networks_does_not(tmp_path: Path) -> None:
    first = run_here(tmp_path / "a")
    again = run_here(tmp_path / "b", seed=1)
    assert first.digest == again.digest
    metrics = rows(tmp_path / "a")
    assert [row.get("layer-width") for row in metrics] == [None, 16, 32, 60, 10]
    # The served model is the initial one until the pass is complete.
    assert [row["global-accuracy"] for row in metrics[:4]] == [metrics[0]["global-accuracy"]] * 4
    learned, unmatched = metrics[4]["global-accuracy"], accuracy_of_unmatched_mean()
    assert learned > 0.7
    assert unmatched < 0.5
    # Lower layers are frozen, but all are sent.
    assert metrics[4]["client-steps"] == metrics[1]["client-steps"] > 0


@pytest.mark.slow
def test_a_wide_model_is_evaluated_saved_and_trained_on(tmp_path: Path) -> None:
    """Nine rounds: two passes and one round more, all with steps enough to move."""
    many = {"batch-size": 512, "matching-gamma": 20.0, "fraction-evaluate": 1.0}
    outcome = run_here(tmp_path / "run", **many, **{"num-server-rounds": 9, "evaluate-every": 1})
    metrics = rows(tmp_path / "run")
    assert all(row["replies-valid"] == CLIENTS for row in metrics[1:])
    assert metrics[1]["layer-width"] > 16
    assert [r["round"] for r in metrics if "personalized-accuracy" in r] == [4, 8, 9]
    final = load_file(tmp_path / "run" / "final_model.safetensors")
    assert len(final["features.0.0.weight"]) == metrics[5]["layer-width"] > 16
    assert state_digest(final) == outcome.digest
    assert metrics[9]["global-accuracy"] == metrics[8]["global-accuracy"]
    best = load_file(tmp_path / "run" / "best_model.safetensors")
    model = model_for(RunConfig.from_run_config(CONFIG), data_for(RunConfig()))
    fit_to_state(model, best).load_state_dict(best)


def test_other_models_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="model 'resnet18' is not one: Conv2d"):
        run_here(tmp_path / "run", model="resnet18")
    assert not (tmp_path / "run").exists()
