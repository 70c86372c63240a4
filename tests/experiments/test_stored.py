# SPDX-License-Identifier: Apache-2.0
"""Inferences beside the rows: written by jobs, so that a report needs no run directory."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from fedfusion_flwr.experiments.figures.distribution import inferred_section
from fedfusion_flwr.experiments.page import write_report
from fedfusion_flwr.experiments.results import read_results
from tests.experiments.folders import REAL_SUITE, cell_name, copied, lines, run_suite, write_lines

SETTING = "fashion-mnist, lenet, components"
DRAWN = f"inferred/{cell_name('fedfusion', 0)}.npz"


def figures(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (folder / "report" / "figures").iterdir()}


def test_report_without_models_and_run_directories(real_suite: Path, tmp_path: Path) -> None:
    folder = copied(real_suite, tmp_path / "results", "runs", "models")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    write_report(folder)
    assert figures(folder) == figures(real_suite)
    page = (folder / "report" / "index.html").read_text()
    assert page == (real_suite / "report" / "index.html").read_text().replace(
        f"suite {real_suite.name}", "suite results"
    )
    # A report changes nothing of what it is made of.
    assert {path: path.read_bytes() for path in before} == before


def test_only_the_first_seeds_inference_is_kept_and_it_is_small(real_suite: Path) -> None:
    (file,) = (real_suite / "inferred").iterdir()
    assert file == real_suite / DRAWN
    assert file.stat().st_size < 50_000


def test_the_same_jobs_write_the_same(real_suite: Path, tmp_path: Path) -> None:
    one_run = REAL_SUITE.replace("'fedavg', 'fed-gn', 'ifca'", "").replace("[0, 1]", "[0]")
    folder = run_suite(tmp_path / "results", real_suite.parent / "stripes.npz", one_run)
    assert (folder / DRAWN).read_bytes() == (real_suite / DRAWN).read_bytes()


def test_a_single_run_stores_nothing(real_suite: Path, tmp_path: Path) -> None:
    run = tmp_path / "one-run"
    shutil.copytree(real_suite / "runs" / cell_name("fedfusion", 0), run)
    before = {path.name for path in run.iterdir()}
    write_report(run)
    assert {path.name for path in run.iterdir()} == before | {"report"}


def test_damaged_and_foreign_inferences_are_ignored(real_suite: Path, tmp_path: Path) -> None:
    folder = copied(real_suite, tmp_path / "results", "runs", "models")
    path = folder / DRAWN
    whole = path.read_bytes()
    shutil.copy(path, folder / "inferred" / "stranger.npz")
    for content in (b"", b"half", whole[:-100], whole[:200] + b"\0\0" + whole[202:]):
        path.write_bytes(content)
        damaged, *rest = inferred_section(read_results(folder)).missing
        assert damaged.startswith(f"'{DRAWN}' is damaged (")
        assert damaged.endswith("; it is ignored.")
        assert rest == [
            f"{SETTING}: no inference of its first seed was kept.",
            "'inferred' has files of no run that is here (stranger); they are ignored.",
        ]
    path.write_bytes(whole)
    rows = lines(folder / "cells.jsonl")
    write_lines(folder / "cells.jsonl", [row | {"digest": "f" * 64} for row in rows])
    foreign, *_ = inferred_section(read_results(folder)).missing
    assert foreign == (f"'{DRAWN}' is of another run than the one in cells.jsonl; it is ignored.")


@pytest.mark.parametrize("split", ["seed", "strategy"])
def test_rows_of_two_machines_are_put_together(
    real_suite: Path, tmp_path: Path, split: str
) -> None:
    """By files side by side or by concatenated files; the references may be there twice."""
    folder = copied(real_suite, tmp_path / "results", "runs", "models")
    rows = lines(folder / "cells.jsonl")
    first = [row for row in rows if row[split] == rows[0][split]]
    write_lines(folder / "cells.jsonl", first)
    write_lines(folder / "cells-b.jsonl", [row for row in rows if row not in first])
    references = lines(folder / "centralized.jsonl")
    write_lines(folder / "centralized.jsonl", references * 2)
    write_report(folder)
    names = [name for name in figures(real_suite) if name.endswith(".csv")]
    for name in names:
        told, whole = (sorted(figures(f)[name].splitlines()) for f in (folder, real_suite))
        assert told == whole, name
