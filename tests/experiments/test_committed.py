# SPDX-License-Identifier: Apache-2.0
"""The committed results of the suite `small`: tables, README and docs say what the rows say."""

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
RESULTS = ROOT / "results" / "small"
RECORDS = ("suite.toml", "tune.jsonl", "cells.jsonl", "centralized.jsonl")
SETTING = {"group": "full participation", "dataset": "fashion-mnist", "partition": "components"}


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    return read_rows(RESULTS / "cells.jsonl")


def test_tables_come_from_the_rows(tmp_path: Path) -> None:
    for name in RECORDS:
        shutil.copy(RESULTS / name, tmp_path / name)
    arguments = ["compare", "small", "--tables", "--output", str(tmp_path)]
    assert main([*arguments, "--engine", "in-process"]) == 0
    made, committed = (
        {path.name: path.read_bytes() for path in (folder / "tables").iterdir()}
        for folder in (tmp_path, RESULTS)
    )
    assert made == committed


def test_the_suite_is_the_one_that_ran() -> None:
    assert (RESULTS / "suite.toml").read_text(encoding="utf-8") == load_suite("small").text


def test_every_row_tells_where_it_comes_from(rows: list[Row]) -> None:
    for row in rows:
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
    table = (RESULTS / "tables" / "main.md").read_text(encoding="utf-8")
    line = next(line for line in table.splitlines() if line.startswith("| fedfusion |"))
    assert shown in line
    stored = json.loads((RESULTS / "tables" / "accuracy.json").read_text(encoding="utf-8"))
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
