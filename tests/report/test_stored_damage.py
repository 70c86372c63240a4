# SPDX-License-Identifier: Apache-2.0
"""Stored measures and inferences that are damaged, or of other runs: named and ignored."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from fedfusion_flwr.report.bias_pictures import bias_section
from fedfusion_flwr.report.bias_store import FILE as STORED
from fedfusion_flwr.report.evidence import read_evidence
from fedfusion_flwr.report.inferred_pictures import inferred_section
from tests.report.folders import LARGE, REAL_STRATEGIES, Row, copied, lines, write_lines

SETTING = "fashion-mnist, lenet, components"


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        ("{", "line 1, is not JSON"),
        ("[]", "line 1, is not a JSON object"),
        (b"\xff\xfe".decode("latin-1"), "line 1, is not JSON"),
        ({"dataset": None}, "line 1, has no valid 'dataset'"),
        ({"seed": True}, "line 1, has no valid 'seed'"),
        ({"divergence": "0.5"}, "line 1, has no list of numbers as 'divergence'"),
        ({"statistics-gaps": ["0.5"]}, "line 1, has no list of numbers as 'statistics-gaps'"),
        ({"feature-distances": [[0.5], [0.5, 0.5]]}, "has more layers in one list"),
        ({"running-means": [0.5]}, "line 1, has not 48 running values of its 48 channels"),
        ({"references": []}, "line 1, has no list of digests as references"),
        ({"digest": None, "cell": "x"}, "line 1, has a cell without digest"),
    ],
)
def test_a_damaged_row_is_ignored(
    real_suite: Path, tmp_path: Path, damage: str | Row, complaint: str
) -> None:
    folder = copied(real_suite, tmp_path / "results", *LARGE)
    rows = (folder / STORED).read_text().splitlines()
    first = json.loads(rows[0])
    rows[0] = damage if isinstance(damage, str) else json.dumps(first | damage)
    (folder / STORED).write_bytes("".join(f"{row}\n" for row in rows).encode("latin-1"))
    section = bias_section(read_evidence(folder))
    (sentence,) = section.missing
    assert complaint in sentence
    assert sentence.startswith(f"'{STORED}', line 1, ")
    assert sentence.endswith("; the line is ignored.")
    (told,) = [p for p in section.parts[0].pictures if p.name.startswith("bias-fashion")]
    # The first row is a floor: one run less of it, and all of the others.
    floor = [row for row in told.numbers if row["strategy"] == first["strategy"]]
    assert len({row["run"] for row in floor if row["measure"] == "feature-distance"}) == 1
    assert {row["strategy"] for row in told.numbers} >= {*REAL_STRATEGIES}


@pytest.mark.parametrize("key", ["digest", "references"])
def test_a_row_of_another_run_is_ignored(real_suite: Path, tmp_path: Path, key: str) -> None:
    folder = copied(real_suite, tmp_path / "results", *LARGE)
    foreign = {"digest": "f" * 64, "references": ["f" * 64]}
    rows = lines(folder / STORED)
    (row,) = [row for row in rows if row["cell"] == "fedavg-0"]
    row[key] = foreign[key]
    write_lines(folder / STORED, rows)
    section = bias_section(read_evidence(folder))
    assert section.missing == [
        f"{STORED} has 1 of 10 rows that were measured on other runs or centralized models than "
        "those of this folder (fedavg-0); they are ignored."
    ]
    told = [
        row["strategy"]
        for row in section.parts[0].pictures[0].numbers
        if row["measure"] == "feature-distance"
    ]
    assert (told.count("fedavg"), told.count("fedfusion")) == (1, 2)
    # It is not thrown away: its run may still be brought here.
    assert lines(folder / STORED) == rows


def test_references_that_were_made_anew(real_suite: Path, tmp_path: Path) -> None:
    folder = copied(real_suite, tmp_path / "results", *LARGE)
    rows = lines(folder / "centralized.jsonl")
    write_lines(folder / "centralized.jsonl", [row | {"digest": "f" * 64} for row in rows])
    section = bias_section(read_evidence(folder))
    assert section.parts == []
    sentence, foreign = section.missing
    assert sentence == f"{SETTING}: no centralized model of this data and model was kept."
    assert foreign == (
        f"{STORED} has 10 of 10 rows that were measured on other runs or centralized models than "
        f"those of this folder (floor of {SETTING} (main), fed-gn-0, fed-gn-1 and 6 more); they "
        "are ignored."
    )


def test_a_run_that_was_made_anew_replaces_its_row(real_suite: Path, tmp_path: Path) -> None:
    folder = copied(real_suite, tmp_path / "results")
    rows = lines(folder / "cells.jsonl")
    write_lines(folder / "cells.jsonl", [row | {"digest": "f" * 64} for row in rows])
    assert bias_section(read_evidence(folder)).missing == []
    assert {row["digest"] for row in lines(folder / STORED)} == {None, "f" * 64}


def test_damaged_and_foreign_inferences_are_ignored(real_suite: Path, tmp_path: Path) -> None:
    folder = copied(real_suite, tmp_path / "results", *LARGE)
    path = folder / "inferred" / "fedfusion-0" / "drawn.npz"
    whole = path.read_bytes()
    shutil.copytree(path.parent, folder / "inferred" / "stranger")
    told = f"{SETTING}: no run directory with a fusion.npz was kept."
    for content in (b"", b"half", whole[:-100], whole[:200] + b"\0\0" + whole[202:]):
        path.write_bytes(content)
        damaged, *rest = inferred_section(read_evidence(folder)).missing
        assert damaged.startswith("'inferred/fedfusion-0/drawn.npz' is damaged (")
        assert damaged.endswith("; it is ignored.")
        assert rest == [
            told, "'inferred' has folders of no run that is here (stranger); they are ignored."
        ]  # fmt: skip
    path.write_bytes(whole)
    rows = lines(folder / "cells.jsonl")
    write_lines(folder / "cells.jsonl", [row | {"digest": "f" * 64} for row in rows])
    foreign, *_ = inferred_section(read_evidence(folder)).missing
    assert foreign == (
        "'inferred/fedfusion-0/drawn.npz' is of another run than the one in cells.jsonl; "
        "it is ignored."
    )
