# SPDX-License-Identifier: Apache-2.0
"""docs/robustness.md is true: its tables are those of the committed rows, its keys exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from benchmarks import honest, noise, robustness
from benchmarks.attackers import ATTACKS, NONE
from fedfusion_flwr import RunConfig
from fedfusion_flwr.experiments.rows import read_rows
from fedfusion_flwr.federation.defence import FEWEST_TO_JUDGE, Defence
from fedfusion_flwr.strategies import build_strategy

DOCS = Path(__file__).parents[2] / "docs"
TEXT = (DOCS / "robustness.md").read_text(encoding="utf-8")
SECURITY = (DOCS / "security.md").read_text(encoding="utf-8")


def test_tables_are_what_the_committed_rows_say() -> None:
    assert robustness.table() in TEXT
    assert honest.table() in TEXT
    assert noise.table() in SECURITY


def test_every_row_of_attacks_names_its_run() -> None:
    rows = read_rows(robustness.RESULTS)
    cells = [(row["attack"], row["share"], row["method"], row["seed"]) for row in rows]
    assert rows
    assert len(cells) == len(set(cells))
    assert set(cells) <= set(robustness.cells())
    for row in rows:
        config = {**robustness.CONFIG, **robustness.OURS.get(row["method"], {})}
        assert row["config"] == {**config, "seed": row["seed"]}
        assert "ended by SIG" not in str(row["stopped"])
        assert row["stopped"] or len(row["accuracy"]) == config["num-server-rounds"] + 1
        assert len(row["hostile"]) == round(row["share"] * config["num-clients"])
        assert "dirty" not in row["commit"]


def test_all_methods_met_every_attack_at_a_fifth() -> None:
    found = {
        (row["attack"], row["method"])
        for row in read_rows(robustness.RESULTS)
        if row["share"] == 0.2
    }
    assert found == {(a, m) for a in ATTACKS if a != NONE for m in robustness.METHODS}


def test_no_honest_client_was_ever_dropped() -> None:
    rows = read_rows(honest.RESULTS)
    assert {row["scenario"] for row in rows} == set(honest.SCENARIOS)
    for row in rows:
        assert row["config"] == {
            **honest.CONFIG,
            **honest.SCENARIOS[row["scenario"]],
            "defence": row["defence"],
        }
        assert row["dropped"] == 0
        assert row["highest-score"] < Defence().outlier_threshold


@pytest.mark.parametrize("config", [robustness.CONFIG, honest.CONFIG, noise.CONFIG])
def test_runs_are_valid(config: dict[str, object]) -> None:
    RunConfig.from_run_config(config)  # type: ignore[arg-type]


def test_the_keys_and_their_robust_defaults() -> None:
    rows = dict(re.findall(r"^\| \d\. [^|]*\| `([a-z-]+)` \| ([\d.]+) \|", TEXT, re.MULTILINE))
    strategy = build_strategy(RunConfig.from_run_config({"defence": "robust"}))
    assert {key: float(value) for key, value in rows.items()} == {
        "outlier-threshold": strategy.defence.outlier_threshold,
        "max-examples-ratio": strategy.defence.max_examples_ratio,
        "clip-quantile": strategy.defence.clip_quantile,
        "max-client-weight": strategy.max_client_weight,
    }
    assert f"threshold of {strategy.defence.outlier_threshold:g}" in TEXT
    assert FEWEST_TO_JUDGE == 4
    assert "fewer than four clients" in TEXT


@pytest.mark.parametrize("attack", ATTACKS)
def test_every_attack_is_told(attack: str) -> None:
    assert attack == NONE or re.search(rf"^\| .*`{attack}`", TEXT, re.MULTILINE)
