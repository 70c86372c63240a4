# SPDX-License-Identifier: Apache-2.0
"""The committed results of the suites: tables, README and docs say what the rows say."""

from __future__ import annotations

import shutil
import statistics
import subprocess
from pathlib import Path

import pytest

from fedfusion_flwr.cli import main
from fedfusion_flwr.experiments.rows import Row, files_of, read_rows, write_rows
from fedfusion_flwr.experiments.suite import load_suite
from tests.experiments.folders import PICTURES

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "results"
SMALL = RESULTS / "small"
SUITES = {"small": "small", "deep": "deep", "averaging": str(RESULTS / "averaging" / "suite.toml")}
"""The folder's name, and what the command is told."""
LARGEST_FILE, LARGEST_FOLDER = 2**20, 5 * 10**6
SETTING = {"group": "full participation", "dataset": "fashion-mnist", "partition": "components"}


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    return rows_of("small")


def rows_of(suite: str) -> list[Row]:
    return [row for file in files_of(RESULTS / suite, "cells") for row in read_rows(file)]


@pytest.mark.parametrize("suite", SUITES)
def test_tables_come_from_the_rows(suite: str, tmp_path: Path) -> None:
    for path in (RESULTS / suite).iterdir():
        if path.is_file():
            shutil.copy(path, tmp_path)
    arguments = ["compare", SUITES[suite], "--tables", "--output", str(tmp_path)]
    assert main([*arguments, "--engine", "in-process"]) == 0
    made, committed = (
        {path.name: path.read_bytes() for path in (folder / "tables").glob("*.md")}
        for folder in (tmp_path, RESULTS / suite)
    )
    assert made == committed


@pytest.mark.parametrize("suite", ["small", "deep"])
def test_the_suite_is_the_one_that_ran(suite: str) -> None:
    ran = (RESULTS / suite / "suite.toml").read_text(encoding="utf-8")
    assert ran == load_suite(suite).text


@pytest.mark.parametrize("suite", SUITES)
def test_every_row_tells_where_it_comes_from(suite: str) -> None:
    for row in rows_of(suite):
        assert all(row[key] for key in ("commit", "machine", "python", "torch", "flwr", "digest"))
        assert not row["commit"].endswith("-dirty")


def test_a_mean_of_the_main_table_is_that_of_the_raw_records(rows: list[Row]) -> None:
    """From single rounds to the table's cell without the package's own arithmetic."""
    finals = [
        row["metrics"]["global-accuracy"][-1]
        for row in rows
        if row["strategy"] == "fedfusion" and row.items() >= SETTING.items()
    ]
    assert len(finals) == 3
    shown = f"{statistics.mean(finals):.3f} ± {statistics.stdev(finals):.3f}"
    table = (SMALL / "tables" / "main.md").read_text(encoding="utf-8")
    line = next(line for line in table.splitlines() if line.startswith("| fedfusion |"))
    assert shown in line


def test_results_are_light() -> None:
    """Rows, tables and the pictures that documents show; all else is made of them."""
    command = ["git", "ls-files", "-z", "results"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    tracked = [ROOT / name for name in done.stdout.split("\0") if name]
    if not tracked:
        pytest.skip("not a git clone")
    sizes = {path: path.stat().st_size for path in tracked if path.exists()}
    assert max(sizes.values()) <= LARGEST_FILE
    assert sum(sizes.values()) <= LARGEST_FOLDER
    pictures = [path for path in sizes if path.suffix == ".svg"]
    shown = "".join((ROOT / name).read_text(encoding="utf-8") for name in ("README.md",))
    assert all(path.name in shown and sizes[path] < 200_000 for path in pictures)
    kinds = {path.suffix for path in sizes}
    assert kinds == {".jsonl", ".toml", ".md", ".npz", ".svg"}


def test_a_page_of_committed_rows(tmp_path: Path) -> None:
    """One setting, so that it does not take minutes."""
    folder = tmp_path / "small"
    shutil.copytree(SMALL / "inferred", folder / "inferred")
    shutil.copy(SMALL / "centralized.jsonl", folder)
    write_rows(folder / "cells.jsonl", [r for r in rows_of("small") if r.items() >= SETTING.items()
                                        and r["strategy"] in ("fedfusion", "fedavg")])  # fmt: skip
    assert main(["report", str(folder)]) == 0
    drawn = {path.name.split("-fashion")[0] for path in (folder / "report/figures").glob("*.svg")}
    assert drawn == PICTURES


@pytest.mark.slow
def test_the_page_of_all_committed_rows(tmp_path: Path) -> None:
    assert main(["report", str(SMALL), "--output", str(tmp_path)]) == 0
    figures = tmp_path / "figures"
    stems = [{path.stem for path in figures.glob(f"*.{kind}")} for kind in ("svg", "csv")]
    assert len(stems[0]) == 145
    assert stems[0] < stems[1]
    for picture in (SMALL / "report" / "figures").glob("*.svg"):
        assert (figures / picture.name).exists()


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
