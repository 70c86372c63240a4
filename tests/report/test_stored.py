# SPDX-License-Identifier: Apache-2.0
"""What a report writes down of models and run directories, so that it can be made without them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from fedfusion_flwr.report import write_report
from fedfusion_flwr.report.bias_pictures import bias_section
from fedfusion_flwr.report.bias_store import FILE as STORED
from fedfusion_flwr.report.evidence import read_evidence
from fedfusion_flwr.report.inferred_pictures import inferred_section
from tests.report.folders import LARGE, REAL_STRATEGIES, Row, copied, lines, write_lines


class Shown(NamedTuple):
    """What two sections show of a folder, and what they say is not shown."""

    numbers: dict[str, str]
    missing: list[str]


def shown(folder: Path) -> Shown:
    """Bias and inferences as the report has them; NaN is equal to itself in their texts."""
    sections = [make(read_evidence(folder)) for make in (bias_section, inferred_section)]
    pictures = [picture for s in sections for part in s.parts for picture in part.pictures]
    return Shown(
        {picture.name: repr(picture.numbers) for picture in pictures},
        [sentence for s in sections for sentence in s.missing],
    )


@pytest.fixture(scope="module")
def whole(real_suite: Path) -> dict[str, str]:
    """The numbers of the suite's own pictures."""
    return shown(real_suite).numbers


def part_of(suite: Path, folder: Path, wanted: Callable[[Row], bool], **changed: Any) -> Path:
    """What a machine would have that did these rows of the suite alone, and measured them."""
    copied(suite, folder, STORED, "inferred")
    for name in ("cells.jsonl", "centralized.jsonl"):
        rows = [row | (changed if name == "cells.jsonl" else {}) for row in lines(folder / name)]
        write_lines(folder / name, [row for row in rows if wanted(row)])
    assert shown(folder).missing == []
    return folder


def joined(folders: list[Path], target: Path) -> Path:
    """The committed files of several machines: concatenated, and ``inferred/`` copied."""
    target.mkdir()
    for name in ("cells.jsonl", "centralized.jsonl", STORED):
        (target / name).write_bytes(b"".join((folder / name).read_bytes() for folder in folders))
    for folder in folders:
        shutil.copytree(folder / "inferred", target / "inferred", dirs_exist_ok=True)
    return target


# --- without models and run directories -----------------------------------------------------------


def figures(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (folder / "report" / "figures").iterdir()}


def test_report_without_models_and_run_directories(real_suite: Path, tmp_path: Path) -> None:
    folder = copied(real_suite, tmp_path / "results", *LARGE)
    stored = (folder / STORED).read_bytes()
    write_report(folder)
    assert figures(folder) == figures(real_suite)
    page = (folder / "report" / "index.html").read_text()
    assert page == (real_suite / "report" / "index.html").read_text().replace(
        f"suite {real_suite.name}", "suite results"
    )
    assert (folder / STORED).read_bytes() == stored


def test_stored_files_are_small_and_the_same_each_time(real_suite: Path, tmp_path: Path) -> None:
    folder = copied(real_suite, tmp_path / "results", STORED, "inferred")
    assert shown(folder).missing == []
    for name in (STORED, "inferred/fedfusion-0/drawn.npz"):
        assert (folder / name).read_bytes() == (real_suite / name).read_bytes()
        assert (folder / name).stat().st_size < 50_000
    # Only the first seed's inference is drawn.
    assert [path.name for path in (folder / "inferred").iterdir()] == ["fedfusion-0"]
    rows = lines(folder / STORED)
    assert len(rows) == 2 * (1 + len(REAL_STRATEGIES))
    assert len({json.dumps(row) for row in rows}) == len(rows)
    told = {row["cell"]: row["digest"] for row in lines(folder / "cells.jsonl")}
    assert {row["cell"]: row["digest"] for row in rows if row["cell"]} == told
    for row in rows:
        assert len(row["references"]) == 2
        assert (row["share-outside"] is None) == (row["strategy"] == "fed-gn")
        assert len(row["running-means"]) == row["channels"] == 48 * (row["strategy"] != "fed-gn")


def test_a_single_run_stores_nothing(real_suite: Path, tmp_path: Path) -> None:
    run = tmp_path / "one-run"
    shutil.copytree(real_suite / "runs" / "fedfusion-0", run)
    before = {path.name for path in run.iterdir()}
    write_report(run)
    assert {path.name for path in run.iterdir()} == before | {"report"}


def test_a_folder_that_cannot_be_written_is_drawn(
    real_suite: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise PermissionError(13, "Permission denied")

    folder = copied(real_suite, tmp_path / "results")
    monkeypatch.setattr("fedfusion_flwr.report.bias_store.write_rows", refuse)
    monkeypatch.setattr("fedfusion_flwr.report.inferred_store.write_bytes", refuse)
    for section in (bias_section(read_evidence(folder)), inferred_section(read_evidence(folder))):
        assert section.parts
        (sentence,) = section.missing
        assert "cannot be written (Permission denied)." in sentence


# --- what is measured anew, and what stays --------------------------------------------------------


def test_rows_of_models_that_are_gone_stay(real_suite: Path, tmp_path: Path) -> None:
    folder = copied(real_suite, tmp_path / "results")
    shutil.rmtree(folder / "runs" / "fedavg-1")
    (folder / "models" / "1-0.safetensors").unlink()
    marked = lines(folder / STORED)
    for row in marked:
        row["statistics-gaps"] = [0.125] * len(row["statistics-gaps"])
    write_lines(folder / STORED, marked)
    assert shown(folder).missing == []
    # All of seed 0 is there; of seed 1 a reference is not, with which all its runs were compared.
    for row, old in zip(lines(folder / STORED), lines(real_suite / STORED), strict=True):
        stays = row["seed"] == 1
        assert (row == old) == (not stays or not old["statistics-gaps"])


def test_a_reference_that_was_never_kept_is_done_without(real_suite: Path, tmp_path: Path) -> None:
    folder = copied(real_suite, tmp_path / "results", STORED)
    (folder / "models" / "1-0.safetensors").unlink()
    with_models = shown(folder)
    rows = lines(folder / STORED)
    assert {(row["seed"], len(row["references"])) for row in rows} == {(0, 2), (1, 1)}
    # No pair of centralized models, so no floor but that of a model by itself.
    (floor,) = [row for row in rows if not row["cell"] and row["seed"] == 1]
    assert (floor["divergence"], len(floor["statistics-gaps"])) == ([], 1)
    for name in LARGE:
        shutil.rmtree(folder / name)
    assert shown(folder) == with_models


def test_rows_without_digests_are_drawn_and_not_stored(
    real_suite: Path, whole: dict[str, str], tmp_path: Path
) -> None:
    folder = copied(real_suite, tmp_path / "results", STORED, "inferred")
    for name in ("cells.jsonl", "centralized.jsonl"):
        write_lines(
            folder / name,
            [{k: v for k, v in row.items() if k != "digest"} for row in lines(folder / name)],
        )
    assert shown(folder) == (whole, [])
    assert not (folder / STORED).exists()
    assert not (folder / "inferred").exists()


# --- two machines ---------------------------------------------------------------------------------


def test_two_machines_with_a_seed_each(
    real_suite: Path, whole: dict[str, str], tmp_path: Path
) -> None:
    parts = [
        part_of(real_suite, tmp_path / f"machine-{seed}", lambda row, s=seed: row["seed"] == s)
        for seed in (0, 1)
    ]
    folder = joined(parts, tmp_path / "results")
    assert {path.name for path in (folder / "inferred").iterdir()} == {"fedfusion-0", "fedfusion-1"}
    assert shown(folder) == (whole, [])


def test_two_machines_with_a_group_each(
    real_suite: Path, whole: dict[str, str], tmp_path: Path
) -> None:
    # Each alone has one group, which its settings then leave out; both have the same references.
    parts = [
        part_of(real_suite, tmp_path / group, lambda _: True, group=group)
        for group in ("here", "there")
    ]
    for path in sorted((parts[1] / "inferred").iterdir()):
        path.rename(path.with_name(f"other-{path.name}"))
    for name in ("cells.jsonl", STORED):
        rows = lines(parts[1] / name)
        write_lines(
            parts[1] / name,
            [row | {"cell": row["cell"] and f"other-{row['cell']}"} for row in rows],
        )
    folder = joined(parts, tmp_path / "results")
    told = {
        f"{name}-{group}": numbers for name, numbers in whole.items() for group in ("here", "there")
    }
    assert shown(folder) == (told, [])
