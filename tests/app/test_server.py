# SPDX-License-Identifier: Apache-2.0
"""Whole runs from the server's side, in this process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from flwr.app import Context, RecordDict
from safetensors import safe_open

from client_app import app
from fedfusion_flwr.app.server import RunOutcome, run
from fedfusion_flwr.config import ConfigError
from fedfusion_flwr.data import PartitionError
from fedfusion_flwr.federation.in_process_grid import InProcessGrid
from fedfusion_flwr.federation.roster import NotEnoughNodes
from tests.runs import rows, run_in_process

ONE_ROUND = {
    "num-server-rounds": 1,
    "partition": "components",
    "train-examples": 1000,
    "test-examples": 200,
}


def run_here(folder: Path, clients: int = 10, **config: Any) -> RunOutcome:
    return run_in_process({**ONE_ROUND, "output-dir": str(folder), **config}, clients=clients)


def test_seed_decides_the_digest(tmp_path: Path) -> None:
    first = run_here(tmp_path / "a")
    again = run_here(tmp_path / "b")
    other = run_here(tmp_path / "c", seed=1)
    assert first.digest == again.digest
    assert first.digest != other.digest
    with safe_open(tmp_path / "a" / "final_model.safetensors", "pt") as stored:
        assert stored.metadata()["digest"] == first.digest


def test_federated_evaluation_and_fedavg(tmp_path: Path) -> None:
    run_here(tmp_path / "run", strategy="fedavg", **{"fraction-evaluate": 0.3})
    last = rows(tmp_path / "run")[-1]
    assert 0 <= last["personalized-accuracy"] <= 1
    assert "mixture" not in last
    assert not (tmp_path / "run" / "fusion.npz").exists()


def test_another_number_of_clients_than_partitions_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="num-clients = 10, but 11 clients are connected"):
        run_here(tmp_path / "more", clients=11)
    with pytest.raises(NotEnoughNodes, match="only 9 of 10 expected clients"):
        run_here(tmp_path / "fewer", clients=9, **{"node-timeout": 0.1})


def test_enough_first_clients_begin_and_a_late_one_joins(tmp_path: Path) -> None:
    run_config = {
        **ONE_ROUND,
        "num-server-rounds": 2,
        "output-dir": str(tmp_path),
        "node-timeout": 0.1,
        "min-available-clients": 9,
    }
    grid = InProcessGrid(app, 10, run_config)
    late = list(grid.nodes)[-1]
    node = grid.nodes.pop(late)
    train = grid.send_and_receive

    def join_after_round_one(*args: Any, **kwargs: Any) -> Any:
        replies = train(*args, **kwargs)
        grid.nodes[late] = node
        return replies

    grid.send_and_receive = join_after_round_one  # type: ignore[method-assign]
    run(grid, Context(1, 0, {}, RecordDict(), run_config))
    clients = rows(tmp_path, "clients.jsonl")
    took_part = {r: {x["partition"] for x in clients if x["round"] == r} for r in (1, 2)}
    assert took_part == {1: set(range(9)), 2: set(range(10))}


def test_infeasible_partition_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(PartitionError, match="classes-per-client"):
        run_here(tmp_path / "run", partition="pathological", **{"classes-per-client": 11})
    assert not (tmp_path / "run").exists()
