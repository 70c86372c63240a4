# SPDX-License-Identifier: Apache-2.0
"""The numbers beside the pictures, against some that were worked out by hand."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from fedfusion_flwr.experiments.figures.variations import differences, usual_config
from fedfusion_flwr.experiments.page import write_report
from tests.experiments.folders import cell, metrics, read_csv, reference, write_suite


@pytest.fixture(scope="module")
def suite(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two strategies, two seeds and a single one; one run ended early; two references."""
    folder = write_suite(
        tmp_path_factory.mktemp("by-hand"),
        [
            cell("fedfusion", 0, metrics([0.1, 0.5, 0.8], personalized=0.9)),
            cell("fedfusion", 1, metrics([0.1, 0.7, 0.9], personalized=1.0)),
            cell("fedavg", 0, metrics([0.1, 0.3, 0.4])),
            cell("fedavg", 1, metrics([0.1, 0.5])),
            cell("fedfusion", 0, metrics([0.1, 0.2]), partition="dirichlet"),
        ],
        [reference(0, 0, [0.5, 0.95]), reference(0, 1, [0.6, 0.97])],
    )
    write_report(folder)
    return folder


def row_of(rows: list[dict[str, str]], **wanted: str) -> dict[str, str]:
    """The one row that has these values; names with underscores."""
    keys = {key.replace("_", "-"): value for key, value in wanted.items()}
    (found,) = [row for row in rows if all(row[key] == value for key, value in keys.items())]
    return found


CURVES, TABLE = "accuracy-mnist-5k-lenet-components", "accuracy-table-global"
PERSONALIZED, LAST = "accuracy-table-personalized", "accuracy-last-mnist-5k-lenet-components"
OURS, THEIRS, POOLED = ({"strategy": s} for s in ("fedfusion", "fedavg", "centralized"))
GROUPS, LABELS = {"partition": "components"}, {"partition": "dirichlet"}


@pytest.mark.parametrize(
    ("name", "line", "expected"),
    [
        (CURVES, OURS | {"round": "2"}, {"accuracy-mean": 0.85, "accuracy-least": 0.8}),
        (CURVES, OURS | {"round": "2"}, {"accuracy-greatest": 0.9}),
        # Two rounds of 3 + 1 kB and 7 steps.
        (CURVES, OURS | {"round": "2"}, {"bytes": 8000.0, "client-steps": 14.0}),
        (CURVES, OURS | {"round": "0"}, {"bytes": 0.0}),
        # A run that ended early counts as far as it went.
        (CURVES, THEIRS | {"round": "1"}, {"accuracy-mean": 0.4, "seeds": 2}),
        (CURVES, THEIRS | {"round": "2"}, {"accuracy-mean": 0.4, "seeds": 1}),
        ("loss-mnist-5k-lenet-dirichlet", {"round": "0"}, {"loss-mean": 2.0}),
        ("loss-mnist-5k-lenet-dirichlet", {"round": "1"}, {"loss-mean": 1.0}),
        # Two values 0.1 apart: their sample deviation is 0.1 / sqrt 2.
        (TABLE, OURS | GROUPS, {"accuracy-mean": 0.85, "accuracy-sd": 0.1 / math.sqrt(2)}),
        (TABLE, OURS | GROUPS, {"runs": 2}),
        (TABLE, OURS | LABELS, {"accuracy-mean": 0.2, "runs": 1}),
        # The last value of each run, of whatever round: 0.4 and 0.5.
        (TABLE, THEIRS, {"accuracy-mean": 0.45}),
        (TABLE, POOLED | GROUPS, {"accuracy-mean": 0.96}),
        (TABLE, POOLED | LABELS, {"accuracy-mean": 0.96}),
        (PERSONALIZED, OURS | GROUPS, {"accuracy-mean": 0.95}),
        (LAST, {"measure": "personalized", "seed": "1"}, {"accuracy": 1.0}),
        (LAST, THEIRS | {"seed": "0"}, {"accuracy": 0.4}),
    ],
)
def test_a_line_by_hand(
    suite: Path, name: str, line: dict[str, str], expected: dict[str, float]
) -> None:
    found = row_of(read_csv(suite, name), **line)
    assert {key: float(found[key]) for key in expected} == pytest.approx(expected)


def test_lines_of_the_tables(suite: Path) -> None:
    assert [(row["strategy"], row["round"]) for row in read_csv(suite, CURVES)] == [
        (strategy, number) for strategy in ("fedfusion", "fedavg") for number in "012"
    ]
    assert len(read_csv(suite, PERSONALIZED)) == 1
    assert row_of(read_csv(suite, TABLE), **OURS, **LABELS)["accuracy-sd"] == ""
    page = (suite / "report" / "index.html").read_text()
    assert "<td>0.850 ± 0.071</td><td>0.200</td>" in page
    assert "<td>0.960 ± 0.014</td><td>0.960 ± 0.014</td>" in page


# --- variations -----------------------------------------------------------------------------------


def varied(tmp_path: Path, cells: list[dict[str, Any]]) -> Path:
    folder = write_suite(tmp_path / "varied", [cell("fedavg", 0, metrics([0.1, 0.5])), *cells])
    write_report(folder)
    return folder


def test_hyper_parameters(tmp_path: Path) -> None:
    def run(strategy: str, seed: int, accuracy: float, **config: Any) -> dict[str, Any]:
        rows = metrics([0.1, accuracy])
        return cell(strategy, seed, rows, group="hyper-parameters", **config)

    cells = [
        run(strategy, seed, accuracy + seed / 8, **config)
        for seed in (0, 1)
        for strategy, accuracy, config in (
            ("fedfusion", 0.5, {}),
            ("fedfusion", 0.375, {"num_components": 2}),
            ("fedfusion", 0.625, {"num_components": 16}),
            ("fedfusion", 0.25, {"local_epochs": 4}),
            ("fedavg", 0.25, {}),
            ("fedavg", 0.125, {"local_epochs": 4}),
            ("fedfusion", 0.0, {"local_epochs": 4, "num_components": 2}),
        )
    ]
    folder = varied(tmp_path, cells)
    rows = read_csv(folder, "hyper-mnist-5k-lenet-components-num-components")
    # The usual number is 8; FedAvg has none of its own and stands there alone.
    assert [(r["strategy"], r["num-components"], r["seed"], r["accuracy"]) for r in rows] == [
        ("fedfusion", "2", "0", "0.375"),
        ("fedfusion", "2", "1", "0.5"),
        ("fedfusion", "8", "0", "0.5"),
        ("fedfusion", "8", "1", "0.625"),
        ("fedfusion", "16", "0", "0.625"),
        ("fedfusion", "16", "1", "0.75"),
        ("fedavg", "8", "0", "0.25"),
        ("fedavg", "8", "1", "0.375"),
    ]
    rows = read_csv(folder, "hyper-mnist-5k-lenet-components-local-epochs")
    assert row_of(rows, strategy="fedavg", local_epochs="4", seed="0")["accuracy"] == "0.125"
    assert row_of(rows, strategy="fedfusion", local_epochs="1", seed="1")["accuracy"] == "0.625"
    page = (folder / "report" / "index.html").read_text()
    assert "varies local-epochs, num-components at once" in page


def test_ablation(tmp_path: Path) -> None:
    cells = [
        cell(strategy, seed, metrics([0.1, accuracy]), group="ablation", **config)
        for seed in (0, 1)
        for share in (1.0, 0.2)
        for strategy, accuracy, config in (
            ("fedfusion", 0.5, {"fraction_train": share}),
            ("fedfusion", 0.6, {"fraction_train": share, "sampling": "random"}),
            ("fedfusion", 0.7, {"fraction_train": share, "statistics_source": "probe"}),
            (
                "fedavgm",
                0.4,
                {"fraction_train": share, "server_momentum": 0.9, "average_decay": 0.0},
            ),
        )
    ]
    folder = varied(tmp_path, cells)
    names = sorted(path.name for path in (folder / "report" / "figures").glob("ablation-*.csv"))
    assert names == [
        "ablation-mnist-5k-lenet-components-100-take-part.csv",
        "ablation-mnist-5k-lenet-components-20-take-part.csv",
    ]
    rows = read_csv(folder, "ablation-mnist-5k-lenet-components-20")
    assert [(row["variant"], row["seed"], row["accuracy"]) for row in rows] == [
        ("fedfusion", "0", "0.5"),
        ("fedfusion", "1", "0.5"),
        ("fedfusion + sampling random", "0", "0.6"),
        ("fedfusion + sampling random", "1", "0.6"),
        ("fedfusion + statistics-source probe", "0", "0.7"),
        ("fedfusion + statistics-source probe", "1", "0.7"),
        ("fedavgm", "0", "0.4"),
        ("fedavgm", "1", "0.4"),
    ]


def test_a_suite_names_its_variants(tmp_path: Path) -> None:
    """As shipped suites do: strategies and partitions with names of their own."""

    def named(label: str, accuracy: float, strategy: str = "fedfusion", **config: Any) -> Any:
        group = config.pop("group")
        made = cell(strategy, 0, metrics([0.1, accuracy]), group=group, **config)
        return {**made, "cell": f"{group}-{label}", "strategy": label}

    sweep = "hyper-parameters"
    cells = [
        named("paper", 0.5, group="ablation", server_momentum=0.0),
        named("paper + probe", 0.625, group="ablation", statistics_source="probe"),
        named("fedavg + averaging", 0.25, "fedavgm", group="ablation"),
        named("fedfusion", 0.5, group=sweep),
        named("num-components 2", 0.375, group=sweep, num_components=2),
        # With twice the epochs half the rounds, for as many steps.
        named("long", 0.25, group=sweep, local_epochs=2, num_server_rounds=15),
    ]
    folder = varied(tmp_path, cells)
    rows = read_csv(folder, "ablation-mnist-5k-lenet-components")
    assert [(row["variant"], row["accuracy"]) for row in rows] == [
        ("paper", "0.5"),
        ("paper + probe", "0.625"),
        ("fedavg + averaging", "0.25"),
    ]
    rows = read_csv(folder, "hyper-mnist-5k-lenet-components-num-components")
    assert [(row["strategy"], row["num-components"], row["accuracy"]) for row in rows] == [
        ("fedfusion", "2", "0.375"),
        ("fedfusion", "8", "0.5"),
    ]
    rows = read_csv(folder, "hyper-mnist-5k-lenet-components-local-epochs")
    assert [(row["local-epochs"], row["accuracy"]) for row in rows] == [("1", "0.5"), ("2", "0.25")]


def test_tables_are_made_for_each_group(tmp_path: Path) -> None:
    folder = write_suite(
        tmp_path,
        [
            cell("fedavg", 0, metrics([0.1, 0.5]), group="full participation"),
            cell("fedavg", 0, metrics([0.1, 0.25]), group="partial participation"),
            cell("a name of its own", 0, metrics([0.1, 0.75]), group="partial participation")
            | {"config": {"strategy": "fedfusion", "a-key-of-another-version": 3}},
        ],
    )
    write_report(folder)
    (row,) = read_csv(folder, "accuracy-table-global-full-participation")
    assert (row["strategy"], row["accuracy-mean"]) == ("fedavg", "0.5")
    rows = read_csv(folder, "accuracy-table-global-partial-participation")
    assert [(row["strategy"], row["accuracy-mean"]) for row in rows] == [
        ("fedavg", "0.25"),
        ("a name of its own", "0.75"),
    ]


def test_usual_config() -> None:
    configs: list[dict[str, Any]] = [
        {"a": 1, "b": 2},
        {"a": 3, "b": 2},
        {"a": 1, "b": 5},
        {"a": 1, "b": 7},
    ]
    usual = usual_config(configs)
    assert usual == {"a": 1, "b": 2}
    assert [differences(c, usual) for c in configs] == [{}, {"a": 3}, {"b": 5}, {"b": 7}]
    assert differences({"a": 1, "b": 2, "seed": 4}, usual) == {}
