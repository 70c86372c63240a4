# SPDX-License-Identifier: Apache-2.0
"""docs/performance.md is true: its tables are those of the committed rows, its keys exist."""

from __future__ import annotations

import re
from pathlib import Path
from types import ModuleType

import pytest
from flwr.proto.federation_config_pb2 import SimulationConfig

from benchmarks import (
    inference_scale,
    local_training,
    precision,
    round_efficiency,
    scale,
    server_round,
    start_up,
)
from benchmarks.measuring import table
from fedfusion_flwr import RunConfig
from fedfusion_flwr.experiments.rows import read_rows
from fedfusion_flwr.federation.round import ClientRow, RoundReport
from fedfusion_flwr.tracking import IdleCores

TEXT = (Path(__file__).parents[2] / "docs" / "performance.md").read_text(encoding="utf-8")
BENCHMARKS = (
    round_efficiency,
    start_up,
    scale,
    server_round,
    inference_scale,
    local_training,
    precision,
)


@pytest.mark.parametrize("module", BENCHMARKS, ids=lambda m: m.__name__)
def test_tables_are_what_the_committed_rows_say(module: ModuleType) -> None:
    rows = read_rows(module.RESULTS)
    assert {row["case"] for row in rows} == set(module.CASES)
    assert all("dirty" not in row["commit"] for row in rows)
    assert table(module.RESULTS, module.CASES, module.COLUMNS) in TEXT
    assert f"python benchmarks/{module.RESULTS.stem}.py" in TEXT


def test_keys_are_those_of_a_run() -> None:
    config = RunConfig().to_run_config()
    named = re.findall(r"^\|[^|]*\| ([^|]*) \|", TEXT, re.MULTILINE)
    keys = {key for cell in named for key in re.findall(r"`([a-z][a-z-]+)", cell)}
    assert {"central-evaluate-every", "vae-step", "precision"} <= keys
    assert keys <= set(config)


def test_federation_keys_are_flowers() -> None:
    fields = {field.name.replace("_", "-") for field in SimulationConfig.DESCRIPTOR.fields}
    commands = re.findall(r'--federation-config "([^"]*)"', TEXT)
    used = {key for command in commands for key in re.findall(r"([a-z-]+)=", command)}
    assert {"client-resources-num-cpus", "client-resources-num-gpus"} <= used
    named = set(re.findall(r"`((?:init-args|client-resources)-[a-z-]+)`", TEXT))
    assert used | named <= fields
    # Why a cluster's address comes from the environment.
    assert not any("address" in field for field in fields)


def test_run_keys_in_commands_exist() -> None:
    commands = re.findall(r"--run-config '([^']*)'", TEXT)
    used = {key for command in commands for key in re.findall(r"([a-z-]+)=", command)}
    assert {"device", "precision"} <= used <= set(RunConfig().to_run_config())


def test_the_hint_is_the_one_that_is_given() -> None:
    rows = [ClientRow(client, client, metrics={"train-seconds": 1.0}) for client in range(10)]
    report = RoundReport(2, clients=rows, seconds={"train": 10.0, "transfer": 0.0})
    hint = IdleCores(2, 1).advice(report)
    assert hint
    assert hint in TEXT
