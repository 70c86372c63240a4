# SPDX-License-Identifier: Apache-2.0
"""Numbers in the README and docs/defaults.md match committed rows; keys exist."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

from benchmarks import defaults, first_run
from fedfusion_flwr.experiments.rows import read_rows

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_table_is_what_the_committed_results_say() -> None:
    assert defaults.table() in (ROOT / "docs" / "defaults.md").read_text(encoding="utf-8")


def test_first_run_is_what_the_committed_results_say() -> None:
    rows = read_rows(first_run.RESULTS)
    assert [row["seed"] for row in rows] == list(first_run.SEEDS)
    assert len({(row["machine"], row["torch"], row["flwr"], row["commit"]) for row in rows}) == 1
    text = README.replace("\n", " ")
    assert first_run.sentence() in text
    assert rows[0]["machine"] in text
    assert f"digest: {rows[0]['digest']}" in text


def test_every_result_names_its_run() -> None:
    rows = defaults.stored()
    cells = [(row["scenario"], row["variant"], row["seed"]) for row in rows]
    assert len(cells) == len(set(cells))
    assert set(cells) <= set(defaults.cells())
    for row in rows:
        assert row["config"]["seed"] == row["seed"]
        assert row["final-accuracy"] == row["accuracy"][-1]
        assert row["last-five-accuracy"] == pytest.approx(sum(row["accuracy"][-5:]) / 5)


def test_main_comparison_has_three_seeds() -> None:
    rows = defaults.stored()
    for scenario in ("components-unequal", "dirichlet-0.1"):
        for variant in ("FedAvg", "FedFusion rho 0.5"):
            seeds = {
                row["seed"]
                for row in rows
                if (row["scenario"], row["variant"]) == (scenario, variant)
            }
            assert seeds == {0, 1, 2}


def test_keys_in_the_readmes_commands_exist() -> None:
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    known = pyproject["tool"]["flwr"]["app"]["config"]
    commands = re.findall(r"--run-config '([^']*)'", README)
    assert commands
    used = {key for command in commands for key in re.findall(r"([a-z-]+)=", command)}
    assert used <= set(known)
