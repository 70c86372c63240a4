# SPDX-License-Identifier: Apache-2.0
"""The committed results of the suites: tables, README and docs say what the rows say."""

from __future__ import annotations

import json
import shutil
import statistics
from pathlib import Path

import pytest

from fedfusion_flwr.cli import main
from fedfusion_flwr.experiments.rows import Row, read_rows
from fedfusion_flwr.experiments.suite_file import load_suite

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "results"
SMALL = RESULTS / "small"
SUITES = {
    "small": "small",
    "deep": "deep",
    "averaging": str(RESULTS / "averaging" / "suite.toml"),
}
"""The folder's name, and what the command is told."""
RECORDS = ("suite.toml", "tune.jsonl", "cells.jsonl", "centralized.jsonl")
SETTING = {"group": "full participation", "dataset": "fashion-mnist", "partition": "components"}


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    return read_rows(SMALL / "cells.jsonl")


@pytest.mark.parametrize("suite", SUITES)
def test_tables_come_from_the_rows(suite: str, tmp_path: Path) -> None:
    for name in RECORDS:
        if (RESULTS / suite / name).exists():
            shutil.copy(RESULTS / suite / name, tmp_path / name)
    arguments = ["compare", SUITES[suite], "--tables", "--output", str(tmp_path)]
    assert main([*arguments, "--engine", "in-process"]) == 0
    made, committed = (
        {path.name: path.read_bytes() for path in (folder / "tables").iterdir()}
        for folder in (tmp_path, RESULTS / suite)
    )
    assert made == committed


@pytest.mark.parametrize("suite", ["small", "deep"])
def test_the_suite_is_the_one_that_ran(suite: str) -> None:
    ran = (RESULTS / suite / "suite.toml").read_text(encoding="utf-8")
    assert ran == load_suite(suite).text


@pytest.mark.parametrize("suite", SUITES)
def test_every_row_tells_where_it_comes_from(suite: str) -> None:
    for row in read_rows(RESULTS / suite / "cells.jsonl"):
        assert all(row[key] for key in ("commit", "machine", "python", "torch", "flwr", "digest"))
        assert not row["commit"].endswith("-dirty")


def test_a_mean_of_the_main_table_is_that_of_the_raw_records(rows: list[Row]) -> None:
    """From single rounds to the table's cell without the package's own arithmetic."""
    finals = [
        max(row["metrics"], key=lambda r: r["round"])["global-accuracy"]
        for row in rows
        if row["strategy"] == "fedfusion" and row.items() >= SETTING.items()
    ]
    assert len(finals) == 3
    shown = f"{statistics.mean(finals):.3f} ± {statistics.stdev(finals):.3f}"
    table = (SMALL / "tables" / "main.md").read_text(encoding="utf-8")
    line = next(line for line in table.splitlines() if line.startswith("| fedfusion |"))
    assert shown in line
    stored = json.loads((SMALL / "tables" / "accuracy.json").read_text(encoding="utf-8"))
    [record] = [r for r in stored if r["strategy"] == "fedfusion" and r.items() >= SETTING.items()]
    assert record["global-accuracy"] == pytest.approx(statistics.mean(finals), abs=1e-12)


@pytest.mark.parametrize("document", ["README.md", "docs/evidence.md"])
def test_documents_quote_the_tables_as_they_are(document: str) -> None:
    """Every line of a table in a block marked with its source is a line of that source."""
    quoted = _quoted((ROOT / document).read_text(encoding="utf-8"))
    assert quoted
    for source, lines in quoted:
        known = (ROOT / source).read_text(encoding="utf-8").splitlines()
        for line in lines:
            assert line in known, f"{document} quotes from {source} what is not there: {line}"


def _quoted(text: str) -> list[tuple[str, list[str]]]:
    """Tables below a comment ``<!-- from FILE -->``, each with its file."""
    found: list[tuple[str, list[str]]] = []
    for block in text.split("<!-- from ")[1:]:
        source, _, rest = block.partition(" -->")
        table = rest.strip("\n").split("\n\n")[0]
        found.append((source, [line for line in table.splitlines() if line.startswith("|")]))
    return found
