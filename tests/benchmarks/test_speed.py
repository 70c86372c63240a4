# SPDX-License-Identifier: Apache-2.0
"""The benchmarks of speed in small: their tables, their jobs, and that contenders do equal work."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import round_efficiency, scale, server_round, start_up
from benchmarks.contenders import train_share
from benchmarks.local_training import bare_loop
from benchmarks.measuring import table
from benchmarks.workload import PICTURES, Workload, periods, turn
from fedfusion_flwr import protocol
from fedfusion_flwr.app.training import train
from fedfusion_flwr.config import RunConfig
from fedfusion_flwr.data import data_for, local_data
from fedfusion_flwr.experiments.rows import append_row, read_rows
from fedfusion_flwr.models import model_for
from fedfusion_flwr.user_code import load_function

BENCHMARKS = [round_efficiency, scale, server_round, start_up]
TINY = Workload(rounds=5, clients=2, examples=67, side=8)


def cells(module: ModuleType, path: Path, row: dict[str, Any]) -> list[list[str]]:
    """The table's lines of this row, without the heading."""
    append_row(path, row)
    lines = table(path, module.CASES, module.COLUMNS).splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_round_efficiency_shows_how_many_rounds_we_do_while_others_do_one(tmp_path: Path) -> None:
    seconds = {"fedfusion": 2.0, "fedavg": 1.9, "bare-loop": 1.8, "stock-app": 5.0}
    shown = cells(round_efficiency, tmp_path / "rows", {"case": "fp32", "seconds": seconds})
    assert shown == [["fp32", "2.00", "1.90", "1.80", "5.00", "-", "-", "0.90", "2.50", "-", "-"]]
    idle = {"fedfusion": 0.3, "fedavg": 0.25, "engine-floor": 0.2}
    row = {"case": "no-op clients", "seconds": idle}
    assert cells(round_efficiency, tmp_path / "rows", row)[1] == [
        *["no-op clients", "0.30", "0.25", "-", "-", "-", "0.20", "-", "-", "-", "1.50"]
    ]


def test_scale_compares_the_first_with_the_last_quarter(tmp_path: Path) -> None:
    row = {
        "case": "in process",
        "clients": 1000,
        "seconds": [1.0, 1.0, 9.0, 9.0, 9.0, 9.0, 2.0, 4.0],
        "infer-seconds": [0.5] * 4 + [0.25] * 4,
        "megabytes": [100.0] * 4 + [200.0] * 4,
    }
    assert cells(scale, tmp_path / "rows", row) == [
        ["in process", "1,000", "8", "1.000 to 3.000", "0.500 to 0.250", "100 to 200"]
    ]


def test_start_up_shows_when_each_phase_is_over(tmp_path: Path) -> None:
    phases = ("accepted", "process", "ray-begins", "server-ready", "actors-begin", "training")
    row = {
        "case": "warm",
        "ended": {phase: float(second) for second, phase in enumerate(phases, 1)},
        "imports": {"torch": 1.5, "flwr": 0.5, "ray": 0.75, "app": 0.25},
    }
    assert cells(start_up, tmp_path / "rows", row) == [
        ["warm", "1.0", "2.0", "3.0", "4.0", "5.0", "6.0", "1.50", "0.50", "0.75", "0.25"]
    ]


def test_imports_are_summed_up_without_those_inside_others() -> None:
    # Torch brings numpy along; the app's own import of torch costs nothing any more.
    report = """import time: self [us] | cumulative | imported package
import time:      1000 |       2000 |   numpy
import time:    500000 |    1500000 | torch
import time:     10000 |      10000 | flwr
import time:     90000 |     240000 | flwr.serverapp
import time:    300000 |     300000 |     fedfusion_flwr
import time:    100000 |     400000 | client_app
"""
    assert start_up.grouped(report) == {"torch": 1.5, "flwr": 0.25, "ray": 0.0, "app": 0.4}


def test_a_round_lasts_until_the_next_one_and_the_first_two_do_not_count() -> None:
    assert periods([0.0, 5.0, 7.0, 8.0, 10.5]) == [1.0, 2.5]


@pytest.mark.parametrize("work", [Workload(), Workload(precision="bf16"), scale.WORK, TINY])
def test_workloads_are_valid_run_configs(work: Workload) -> None:
    config = RunConfig.from_run_config(work.config(Path("anywhere")))
    assert config.num_clients == work.clients
    # Only before the first and after the last round.
    assert config.central_evaluate_every > config.num_server_rounds
    assert config.fraction_evaluate == 0


def test_every_client_has_the_same_number_of_pictures(tmp_path: Path) -> None:
    TINY.write_pictures(tmp_path)
    config = RunConfig.from_run_config(TINY.config(tmp_path))
    assert [len(local_data(config, client).x) for client in range(2)] == [67, 67]
    with np.load(tmp_path / PICTURES) as stored:
        assert stored["x_train"].shape == (2 * 67, 8, 8)
        assert stored["x_train"].dtype == np.uint8


def test_the_bare_loop_takes_as_many_gradient_steps_as_our_client(tmp_path: Path) -> None:
    work = Workload(clients=2, examples=67, side=8)
    work.write_pictures(tmp_path)
    config = RunConfig.from_run_config(work.config(tmp_path))
    share = local_data(config, 0)
    model = model_for(config, data_for(config))
    steps = []
    model.register_forward_pre_hook(lambda *_: steps.append(1))
    bare_loop(model, model, share.x, share.y, "fp32")
    bare = len(steps)
    ours = train(
        model,
        share.x,
        share.y,
        epochs=config.local_epochs,
        batch_size=config.batch_size,
        learning_rate=config.learning_rate,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
        generator=torch.Generator().manual_seed(0),
    )
    # 67 examples in batches of 32 are 32, 32 and 3.
    assert (bare, ours.steps) == (3, 3)


class Alone:
    """Barrier and queue of a bare loop of one process."""

    def __init__(self) -> None:
        self.waits = 0
        self.answers: list[list[float]] = []

    def wait(self, timeout: float) -> None:
        self.waits += 1

    def put(self, starts: list[float]) -> None:
        self.answers.append(starts)


def test_bare_loops_begin_every_round_together(tmp_path: Path) -> None:
    TINY.write_pictures(tmp_path)
    threads = torch.get_num_threads()
    alone: Any = Alone()
    train_share(0, TINY, tmp_path, alone, alone)
    torch.set_num_threads(threads)
    (starts,) = alone.answers
    assert alone.waits == len(starts) == TINY.rounds
    assert starts == sorted(starts)


def test_contenders_are_there() -> None:
    contenders = {**round_efficiency.TRAINING, **round_efficiency.IDLE}
    for reference in {name for key, name in contenders.items() if key != "pfl"}:
        assert callable(load_function("contender", reference, ValueError))  # type: ignore[arg-type]
    assert importlib.util.find_spec(round_efficiency.TRAINING["pfl"].partition(":")[0])


def test_scale_notes_time_and_memory_of_every_round() -> None:
    work = Workload(rounds=4, clients=6, examples=4, side=8)
    row = scale.measure("in process", work, sampled=2)
    assert (row["clients"], row["sampled"]) == (6, 2)
    assert len(row["megabytes"]) == len(row["infer-seconds"]) == 4
    assert len(row["seconds"]) == 3
    assert min(row["megabytes"] + row["seconds"]) > 0


def test_the_servers_round_is_taken_apart() -> None:
    row = server_round.measure("lenet", 3)
    parts, whole = row["parts"], row["seconds"]["fedfusion"]
    assert set(parts) == {"checks", "inference", "fusion", "rest"}
    assert min(parts.values()) > 0
    # The clock of the parts starts within that of the whole.
    assert 0.5 * whole < sum(parts.values()) <= whole
    assert set(row["seconds"]) == {"reading", "plain-sum", "fedfusion", "flower-fedavg"}
    least = min(row["seconds"]["reading"], row["seconds"]["plain-sum"])
    assert row["floor-seconds"] == pytest.approx(2 * least + parts["inference"])


def test_the_bare_reading_reads_every_value_once() -> None:
    state = {"a": torch.ones(2, 3), "count": torch.tensor(7)}
    contents = server_round.replies(state, 2)
    models = [protocol.state_from_record(c.array_records["arrays"]) for c in contents]
    assert server_round.reading(state, contents) == pytest.approx(
        [float(model["a"].square().sum()) for model in models]
    )
    fused = server_round.plain_sum(state, contents)
    assert set(fused) == {"a"}
    assert torch.allclose(fused["a"], (models[0]["a"] + models[1]["a"]) / 2)


def test_the_servers_table_tells_of_parts_and_floor(tmp_path: Path) -> None:
    row = {
        "case": "lenet x 10",
        "seconds": {"reading": 0.25, "plain-sum": 0.5, "fedfusion": 2.0, "flower-fedavg": 4.0},
        "parts": {"checks": 0.5, "inference": 0.75, "fusion": 0.625, "rest": 0.125},
        "floor-seconds": 1.25,
        "extra-models": 0.5,
    }
    shown = cells(server_round, tmp_path / "rows", row)[0]
    assert shown[1:6] == ["2.000", "0.500", "0.750", "0.625", "0.125"]
    assert shown[6:] == ["1.250", "1.60", "4.00", "0.50", "0.5"]


@pytest.mark.parametrize("module", BENCHMARKS)
def test_stored_rows_have_all_columns(module: ModuleType) -> None:
    for row in read_rows(module.RESULTS):
        assert row["case"] in module.CASES
        assert {"commit", "machine", "torch", "flwr"} <= row.keys()
        assert all(str(show(row)) for show in module.COLUMNS.values())


@pytest.mark.slow
@pytest.mark.parametrize(
    "contender",
    [
        "benchmarks.contenders:fedfusion",
        "benchmarks.contenders:bare_loops",
        "benchmarks.contenders:engine_floor",
        "benchmarks.stock_app:round_starts",
    ],
)
def test_a_turn_of_each_contender(contender: str, tmp_path: Path) -> None:
    TINY.write_pictures(tmp_path)
    seconds = turn(contender, TINY, tmp_path)
    assert len(seconds) == TINY.rounds - 3  # Two first rounds, and the last one's end is not seen.
    assert min(seconds) > 0


@pytest.mark.slow
@pytest.mark.engine
def test_the_phases_of_a_start_follow_each_other() -> None:
    ended = start_up.measure("cold")["ended"]
    assert 0 < ended["accepted"] < ended["process"] < ended["ray-begins"] < ended["actors-begin"]
    assert ended["process"] < ended["server-ready"] < ended["training"]
    assert ended["actors-begin"] < ended["training"]
