# SPDX-License-Identifier: Apache-2.0
"""Tables of invented rows, by hand."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any

import pytest
from pandas import DataFrame

from fedfusion_flwr.experiments import tables
from fedfusion_flwr.experiments.results import runs_table
from fedfusion_flwr.experiments.tables import main_table, markdown, records, write_tables
from tests.experiments.folders import cell, metrics


def row(
    strategy: str,
    seed: int,
    accuracies: list[float | None],
    personalized: float | None = None,
    partition: str = "iid",
    group: str = "main",
) -> dict[str, Any]:
    rounds = metrics(accuracies, personalized)
    return cell(strategy, seed, rounds, partition=partition, group=group)


SETTING = {"group": "main", "dataset": "mnist-5k", "model": "lenet", "partition": "iid"}
TWO_SETTINGS = [
    row("fedfusion", 0, [0.1, 0.5, 0.8], personalized=0.9),
    row("fedfusion", 1, [0.1, 0.7, 0.6], personalized=0.7),
    row("fedavg", 0, [0.1, 0.4, 0.5], personalized=0.5),
    row("fedavg", 1, [0.1, 0.5, 0.5], personalized=0.5),
    row("fedfusion", 0, [0.1, 0.2, 0.4], partition="skewed"),
    row("fedavg", 0, [0.1, 0.2, 0.5], partition="skewed"),
]


def made(name: str, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A table of these rows, a dict a line."""
    runs, rounds = runs_table(rows)
    given = (runs, rounds) if name == "to_target" else (runs,)
    return records(getattr(tables, name)(*given))


def only(records: list[dict[str, Any]], **wanted: Any) -> dict[str, Any]:
    found = [r for r in records if all(r[key] == value for key, value in wanted.items())]
    assert len(found) == 1, found
    return found[0]


def test_accuracy_is_the_last_rounds_with_its_spread() -> None:
    record = only(made("accuracy", TWO_SETTINGS), strategy="fedfusion", partition="iid")
    assert record["seeds"] == 2
    assert record["global-accuracy"] == pytest.approx(0.7)
    assert record["global-accuracy-spread"] == pytest.approx(0.2 / math.sqrt(2))
    assert record["personalized-accuracy"] == pytest.approx(0.8)
    assert record["global-loss"] == pytest.approx(2 / 3)


def test_one_seed_claims_no_spread() -> None:
    record = only(made("accuracy", TWO_SETTINGS), strategy="fedavg", partition="skewed")
    assert record["global-accuracy"] == 0.5
    assert record["global-accuracy-spread"] is None
    assert record["personalized-accuracy"] is None
    assert "± " not in main_table(DataFrame([record]))


def test_a_round_without_the_metric_does_not_hide_the_one_before() -> None:
    record = made("accuracy", [row("fedavg", 0, [0.1, 0.4, None])])[0]
    assert record["global-accuracy"] == 0.4


def test_round_zero_is_no_result() -> None:
    record = made("accuracy", [row("fedavg", 0, [0.9])])[0]
    assert record["global-accuracy"] is None
    assert made("to_target", [row("fedavg", 0, [0.9])]) == []


def test_ranks_are_means_over_settings() -> None:
    # iid: fedfusion .7 before fedavg .5; skewed: fedavg .5 before fedfusion .4.
    ranks = made("ranks", TWO_SETTINGS)
    for strategy in ("fedfusion", "fedavg"):
        record = only(ranks, strategy=strategy, metric="global-accuracy")
        assert (record["rank"], record["wins"], record["settings"]) == (1.5, 1, 2)
    # Only iid has the personalized accuracy of both.
    record = only(ranks, strategy="fedavg", metric="personalized-accuracy")
    assert (record["rank"], record["wins"], record["settings"]) == (2.0, 0, 1)


def test_equals_share_the_mean_of_their_ranks() -> None:
    rows = [row(name, 0, [0.1, value]) for name, value in {"a": 0.5, "b": 0.5, "c": 0.9}.items()]
    found = {r["strategy"]: r["rank"] for r in made("ranks", rows)}
    assert found == {"c": 1.0, "a": 2.5, "b": 2.5}


def test_a_setting_that_a_strategy_lacks_ranks_nobody() -> None:
    rows = [*TWO_SETTINGS, row("ifca", 0, [0.1, 0.9])]
    record = only(made("ranks", rows), strategy="ifca", metric="global-accuracy")
    assert (record["rank"], record["settings"]) == (1.0, 1)


def test_differences_are_paired_by_setting_and_seed() -> None:
    found = [r for r in made("differences", TWO_SETTINGS) if r["metric"] == "global-accuracy"]
    iid = only(found, partition="iid")
    # .8 - .5 and .6 - .5: mean .2, deviation .1 sqrt(2), and 12.7062 is t's with one degree.
    assert iid["difference"] == "fedfusion - fedavg"
    assert (iid["pairs"], iid["above"], iid["below"]) == (2, 2, 0)
    assert iid["mean"] == pytest.approx(0.2)
    assert iid["t-low"] == pytest.approx(0.2 - 12.7062 * 0.1, abs=1e-5)
    assert iid["t-high"] == pytest.approx(0.2 + 12.7062 * 0.1, abs=1e-5)
    assert iid["bootstrap-low"] is None
    skewed = only(found, partition="skewed")
    assert (skewed["mean"], skewed["t-low"]) == (pytest.approx(-0.1), None)
    both = only(found, partition="all")
    assert (both["pairs"], both["above"], both["below"]) == (3, 2, 1)
    assert both["mean"] == pytest.approx(0.1)
    # One of the two settings drawn twice, with probability 1/4 each.
    assert both["bootstrap-low"] == pytest.approx(-0.1)
    assert both["bootstrap-high"] == pytest.approx(0.2)


def test_a_seed_without_a_partner_makes_no_pair() -> None:
    rows = [row("fedfusion", 0, [0.1, 0.9]), row("fedavg", 1, [0.1, 0.5])]
    assert made("differences", rows) == []


def test_cost_of_reaching_the_target() -> None:
    # The best mean is .7, so the target is .63: seed 0 is there in round 2, seed 1 in round 1.
    found = made("to_target", TWO_SETTINGS)
    record = only(found, strategy="fedfusion", partition="iid")
    assert record["target"] == pytest.approx(0.63)
    assert (record["reached"], record["seeds"]) == (2, 2)
    assert record["rounds"] == 1.5
    assert record["bytes"] == 6000.0
    assert record["client-steps"] == 10.5
    never = only(found, strategy="fedavg", partition="iid")
    assert (never["reached"], never["rounds"], never["bytes"]) == (0, None, None)


def test_costs_of_whole_runs() -> None:
    record = only(made("costs", TWO_SETTINGS), strategy="fedavg", partition="iid")
    wanted = {"rounds": 2.0, "client-steps": 14.0, "bytes": 8000.0, "seconds": 1.5}
    assert record == {
        **SETTING,
        "strategy": "fedavg",
        "seeds": 2,
        "extra-forward-examples": 0.0,
        "server-aggregations": 0.0,
        **wanted,
    }


def test_groups_are_not_compared_with_each_other() -> None:
    rows = [row("fedfusion", 0, [0.1, 0.9]), row("fedavg", 0, [0.1, 0.5], group="ablation")]
    assert made("differences", rows) == []
    assert {r["rank"] for r in made("ranks", rows)} == {1.0}


def test_the_same_numbers_as_markdown_csv_and_json(tmp_path: Path) -> None:
    written = write_tables(tmp_path, TWO_SETTINGS)
    assert {path.suffix for path in written} == {".md", ".csv", ".json"}
    told = json.loads((tmp_path / "tables" / "accuracy.json").read_text())
    assert told == made("accuracy", TWO_SETTINGS)
    with (tmp_path / "tables" / "accuracy.csv").open() as file:
        lines = list(csv.DictReader(file))
    for line, record in zip(lines, told, strict=True):
        for key, value in line.items():
            assert value == ("" if record[key] is None else str(record[key]))
    text = (tmp_path / "tables" / "main.md").read_text()
    assert "| fedfusion | **0.700 ± 0.141** | 0.400 |" in text
    assert "| fedavg | 0.500 ± 0.000 | **0.500** |" in text


def test_no_rows_make_no_tables(tmp_path: Path) -> None:
    assert write_tables(tmp_path, []) == []


def test_large_and_missing_numbers_in_markdown() -> None:
    assert (
        markdown(DataFrame([{"a": 12345.6, "b": None, "c": 3}])).splitlines()[2]
        == "| 12346 |  | 3 |"
    )


def test_the_main_table_is_one_for_each_group_and_data_set() -> None:
    def record(dataset: str, partition: str, strategy: str, value: float) -> dict[str, object]:
        names = {"group": "g", "dataset": dataset, "model": "lenet", "partition": partition}
        return {**names, "strategy": strategy, "global-accuracy": value} | dict.fromkeys(
            ("global-accuracy-spread", "personalized-accuracy")
        )

    lines = [
        record("one", "p", "fedavg", 0.5),
        record("one", "q", "fedavg", 0.75),
        record("one", "p", "fedfusion", 0.625),
        record("two", "p", "fedavg", 0.25),
    ]
    table = main_table(DataFrame(lines))
    assert table == (
        "## g, one: global-accuracy\n\n"
        "| strategy | lenet, p | lenet, q |\n"
        "|---|---|---|\n"
        "| fedavg | 0.500 | **0.750** |\n"
        "| fedfusion | **0.625** |  |\n"
        "\n"
        "## g, two: global-accuracy\n\n"
        "| strategy | lenet, p |\n"
        "|---|---|\n"
        "| fedavg | **0.250** |\n"
    )
