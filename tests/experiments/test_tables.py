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


IID = {"partition": "iid"}
SKEWED = {"partition": "skewed"}
OURS, THEIRS = {"strategy": "fedfusion"}, {"strategy": "fedavg"}
GLOBAL = {"metric": "global-accuracy"}
PERSONALIZED = {"metric": "personalized-accuracy"}


@pytest.mark.parametrize(
    ("table", "line", "expected"),
    [
        # The last rounds, with their spread.
        ("accuracy", OURS | IID, {"seeds": 2, "global-accuracy": 0.7, "global-loss": 2 / 3}),
        ("accuracy", OURS | IID, {"global-accuracy-spread": 0.2 / math.sqrt(2)}),
        ("accuracy", OURS | IID, {"personalized-accuracy": 0.8}),
        # One seed claims no spread.
        ("accuracy", THEIRS | SKEWED, {"global-accuracy": 0.5, "global-accuracy-spread": None}),
        ("accuracy", THEIRS | SKEWED, {"personalized-accuracy": None}),
        # Means over settings; iid: fedfusion .7 before fedavg .5; skewed: fedavg .5 before .4.
        ("ranks", OURS | GLOBAL, {"rank": 1.5, "wins": 1, "settings": 2}),
        ("ranks", THEIRS | GLOBAL, {"rank": 1.5, "wins": 1, "settings": 2}),
        # Only iid has the personalized accuracy of both.
        ("ranks", THEIRS | PERSONALIZED, {"rank": 2.0, "wins": 0, "settings": 1}),
        # .8 - .5 and .6 - .5: mean .2, deviation .1 sqrt(2), and 12.7062 is t's with one degree.
        (
            "differences",
            IID | GLOBAL,
            {"difference": "fedfusion - fedavg", "pairs": 2, "mean": 0.2, "above": 2, "below": 0},
        ),
        ("differences", IID | GLOBAL, {"t-low": 0.2 - 1.27062, "t-high": 0.2 + 1.27062}),
        ("differences", IID | GLOBAL, {"bootstrap-low": None}),
        ("differences", SKEWED | GLOBAL, {"mean": -0.1, "t-low": None}),
        (
            "differences",
            {"partition": "all"} | GLOBAL,
            {"pairs": 3, "mean": 0.1, "above": 2, "below": 1},
        ),
        # One of the two settings drawn twice, with probability 1/4 each.
        (
            "differences",
            {"partition": "all"} | GLOBAL,
            {"bootstrap-low": -0.1, "bootstrap-high": 0.2},
        ),
        # The best mean is .7, so the target is .63: seed 0 is there in round 2, seed 1 in round 1.
        ("to_target", OURS | IID, {"target": 0.63, "reached": 2, "seeds": 2, "rounds": 1.5}),
        ("to_target", OURS | IID, {"bytes": 6000.0, "client-steps": 10.5}),
        ("to_target", THEIRS | IID, {"reached": 0, "rounds": None, "bytes": None}),
        ("costs", THEIRS | IID, {"seeds": 2, "rounds": 2.0, "client-steps": 14.0}),
        ("costs", THEIRS | IID, {"bytes": 8000.0, "seconds": 1.5, **SETTING}),
        ("costs", THEIRS | IID, {"extra-forward-examples": 0.0, "server-aggregations": 0.0}),
    ],
)
def test_a_line_by_hand(table: str, line: dict[str, str], expected: dict[str, Any]) -> None:
    record = only(made(table, TWO_SETTINGS), **line)
    assert {key: record[key] for key in expected} == pytest.approx(expected, abs=1e-5)


def test_one_seed_claims_no_spread_in_the_main_table() -> None:
    record = only(made("accuracy", TWO_SETTINGS), strategy="fedavg", partition="skewed")
    assert "± " not in main_table(DataFrame([record]))


def test_a_round_without_the_metric_does_not_hide_the_one_before() -> None:
    record = made("accuracy", [row("fedavg", 0, [0.1, 0.4, None])])[0]
    assert record["global-accuracy"] == 0.4


def test_round_zero_is_no_result() -> None:
    record = made("accuracy", [row("fedavg", 0, [0.9])])[0]
    assert record["global-accuracy"] is None
    assert made("to_target", [row("fedavg", 0, [0.9])]) == []


def test_equals_share_the_mean_of_their_ranks() -> None:
    rows = [row(name, 0, [0.1, value]) for name, value in {"a": 0.5, "b": 0.5, "c": 0.9}.items()]
    found = {r["strategy"]: r["rank"] for r in made("ranks", rows)}
    assert found == {"c": 1.0, "a": 2.5, "b": 2.5}


def test_a_setting_that_a_strategy_lacks_ranks_nobody() -> None:
    rows = [*TWO_SETTINGS, row("ifca", 0, [0.1, 0.9])]
    record = only(made("ranks", rows), strategy="ifca", metric="global-accuracy")
    assert (record["rank"], record["settings"]) == (1.0, 1)


def test_a_seed_without_a_partner_makes_no_pair() -> None:
    rows = [row("fedfusion", 0, [0.1, 0.9]), row("fedavg", 1, [0.1, 0.5])]
    assert made("differences", rows) == []


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
