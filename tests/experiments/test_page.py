# SPDX-License-Identifier: Apache-2.0
"""The report as a whole: of a suite that was run, of one run, and of what is no result."""

from __future__ import annotations

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fedfusion_flwr.cli import main
from fedfusion_flwr.experiments.figures.draw import looks
from fedfusion_flwr.experiments.page import write_report
from fedfusion_flwr.experiments.results import CENTRALIZED
from fedfusion_flwr.experiments.rows import ResultsError
from fedfusion_flwr.strategies import registry
from tests.experiments.folders import (
    PICTURES,
    cell,
    cell_name,
    metrics,
    read_csv,
    reference,
    write_lines,
    write_suite,
)


class Elements(HTMLParser):
    """Every start tag of a page with its attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.found if name == tag]


def page_of(folder: Path) -> str:
    return (folder / "report" / "index.html").read_text(encoding="utf-8")


# --- a suite --------------------------------------------------------------------------------------


def test_every_picture_is_there_three_times(real_suite: Path) -> None:
    figures = real_suite / "report" / "figures"
    stems = {suffix: {path.stem for path in figures.glob(f"*.{suffix}")} for suffix in
             ("svg", "png", "csv")}  # fmt: skip
    assert stems["svg"] == stems["png"]
    assert stems["csv"] - stems["svg"] == {"accuracy-table-global", "accuracy-table-personalized"}
    assert {re.sub("-fashion-mnist.*", "", stem) for stem in stems["svg"]} == {
        *PICTURES,
        "inferred-mixtures",
    }
    for path in figures.glob("*.png"):
        with Image.open(path) as image:
            image.load()
            assert image.width == 630


def test_page_needs_nothing_else(real_suite: Path) -> None:
    elements = Elements(page_of(real_suite))
    figures = real_suite / "report" / "figures"
    assert not elements.all("script")
    for tag, attributes in elements.found:
        assert "style" not in attributes
        link = attributes.get("href") or attributes.get("src") or ""
        if tag == "img":
            assert link.startswith("data:image/svg+xml,")
        elif link and not link.startswith(("#", "data:,")):
            assert (figures.parent / link).is_file()
    images = elements.all("img")
    assert len(images) == len(list(figures.glob("*.svg")))
    for image in images:
        assert len(image["alt"] or "") > 20
    anchors = [attributes["id"] for _, attributes in elements.found if "id" in attributes]
    assert len(anchors) == len(set(anchors))
    for link in elements.all("a"):
        target = link["href"] or ""
        assert not target.startswith("#") or target[1:] in anchors


def test_inference_is_what_the_run_recorded(real_suite: Path) -> None:
    with np.load(real_suite / "runs" / cell_name("fedfusion", 0) / "fusion.npz") as stored:
        told = {name: stored[name] for name in stored.files}
    rows = read_csv(real_suite, "inferred-assignments")
    assert len(rows) == told["assignments"].size
    for row in rows:
        r = told["rounds"].tolist().index(int(row["round"]))
        k = told["clients"].tolist().index(int(row["client"]))
        value = told["assignments"][r, k, int(row["component"])]
        assert float(row["assignment"]) == value
        assert int(row["planted"]) == told["planted"][k]
    # Six clients in two planted groups of three.
    assert sorted(told["planted"]) == [0, 0, 0, 1, 1, 1]
    rows = read_csv(real_suite, "inferred-mixtures")
    for row in rows:
        k = told["clients"].tolist().index(int(row["client"]))
        m = int(row["component"])
        planted = told["planted_mixtures"][k]
        assert float(row["planted"]) == (planted[m] if m < len(planted) else 0)
        b = told["assignments"][-1, k]
        assert float(row["inferred"]) == (b[int(row["matched"])] if row["matched"] else 0)
    assert sum(float(row["planted"]) for row in rows) == 6
    assert sum(float(row["inferred"]) for row in rows) == pytest.approx(6)
    rows = read_csv(real_suite, "inferred-components")
    assert len(rows) % (4 * 48) == 0
    for row in rows[:: len(rows) // 7]:
        at = ["mean", "log deviation", "shift", "scale"].index(row["kind"]) * 48
        members = told["planted"] == int(row["planted"])
        expected = told["statistics"][members, at + int(row["channel"])].mean()
        assert float(row["true"]) == pytest.approx(expected, rel=1e-5)
        decoded = told["components"][-1, int(row["component"]), at + int(row["channel"])]
        assert float(row["reconstructed"]) == decoded
    rows = read_csv(real_suite, "recovery")
    assert {row["strategy"] for row in rows} == {"fedfusion", "ifca"}
    assert {row["metric"] for row in rows} == {
        "adjusted-rand-index",
        "normalized-mutual-information",
    }


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    folder = write_suite(
        tmp_path, [cell("fedfusion", 0, metrics([0.1, 0.5]))], [reference(0, 0, [0.9])]
    )
    write_report(folder)
    page = page_of(folder)
    for sentence in (
        "mnist-5k, lenet, components: no inference of its first seed was kept.",
        "mnist-5k, lenet, components: no run was compared with a centralized model.",
        "No cells of a group hyper-parameters.",
        "No cells of a group ablation.",
    ):
        assert sentence in page
    assert "<dt>failed runs</dt><dd>none</dd>" in page
    (folder / "centralized.jsonl").unlink()
    write_lines(folder / "failures.jsonl", [{"cell": "main-ifca-0", "reason": "no memory"}])
    write_report(folder)
    assert "no centralized reference of this data and model." in page_of(folder)
    assert "components: no centralized model of this data and model." in page_of(folder)
    assert "<dt>failed runs</dt><dd>main-ifca-0</dd>" in page_of(folder)


def test_names_are_text_not_markup(tmp_path: Path) -> None:
    row = cell("fedavg", 0, metrics([0.1, 0.5]), partition="<b>50 % & more</b>")
    folder = write_suite(tmp_path, [row])
    write_report(folder)
    assert "&lt;b&gt;50 % &amp; more&lt;/b&gt;" in page_of(folder)
    assert not Elements(page_of(folder)).all("b")


# --- a run ----------------------------------------------------------------------------------------


def test_report_of_one_run(real_suite: Path, tmp_path: Path) -> None:
    run = tmp_path / "one-run"
    shutil.copytree(real_suite / "runs" / cell_name("fedfusion", 0), run)
    assert write_report(run) == run / "report" / "index.html"
    page = page_of(run)
    assert "One run of fedfusion on npz, lenet, components: 6 clients, 2 rounds, seed 0." in page
    assert "<dt>num-components</dt><dd>3</dd>" in page
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    told = read_csv(run, "accuracy-npz-lenet-components")
    assert [float(r["accuracy-mean"]) for r in told] == [r["global-accuracy"] for r in rows]
    spent = sum(row.get("bytes-up", 0) + row.get("bytes-down", 0) for row in rows)
    assert float(told[-1]["bytes"]) == spent > 0
    # The same records make the same files.
    again = tmp_path / "again"
    write_report(run, again)
    files = sorted(path.relative_to(again) for path in again.rglob("*") if path.is_file())
    assert len(files) > 20
    for name in files:
        assert (run / "report" / name).read_bytes() == (again / name).read_bytes(), name


def test_a_run_that_is_still_going_on(real_suite: Path, tmp_path: Path) -> None:
    run = tmp_path / "one-run"
    shutil.copytree(real_suite / "runs" / cell_name("fedavg", 0), run)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"round": 3, "global-acc')
    write_report(run)
    assert len(read_csv(run, "accuracy-npz-lenet-components")) == 3
    assert "The run has no fusion.npz: only fedfusion infers a distribution." in page_of(run)


def test_a_run_that_has_only_begun(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"strategy": "fedavg"}))
    write_lines(
        tmp_path / "metrics.jsonl", [{"round": 0, "global-accuracy": 0.1, "global-loss": None}]
    )
    write_report(tmp_path)
    page = page_of(tmp_path)
    assert "no round has global-loss" in page
    (row,) = read_csv(tmp_path, "accuracy-mnist-5k")
    assert (row["round"], row["accuracy-mean"], row["bytes"]) == ("0", "0.1", "0.0")


# --- what is no result ----------------------------------------------------------------------------


def test_a_folder_of_other_things(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ResultsError, match="neither a run directory"):
        write_report(tmp_path)
    assert main(["report", str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith(f"error: '{tmp_path}' is neither")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("lines", "complaint"),
    [
        (["", "{}"], "line 1, is not JSON"),
        (["[]", "{}"], "line 1, is not a JSON object"),
        ([json.dumps({"cell": "a"})], "lacks 'dataset'"),
        (["{"], "holds no finished cell yet"),
        ([], "holds no finished cell yet"),
    ],
)
def test_damaged_records(tmp_path: Path, lines: list[str], complaint: str) -> None:
    (tmp_path / "cells.jsonl").write_text("".join(f"{line}\n" for line in lines))
    with pytest.raises(ResultsError, match=complaint):
        write_report(tmp_path)


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_suite(tmp_path / "suite", [cell("fedavg", 0, metrics([0.1, 0.5]))])
    output = tmp_path / "elsewhere"
    assert main(["report", str(folder), "--output", str(output)]) == 0
    assert capsys.readouterr().out == f"{output / 'index.html'}\n"
    assert not (folder / "report").exists()


# --- looks ----------------------------------------------------------------------------------------


def test_every_strategy_differs_without_its_colour() -> None:
    names = (*registry(), "made up", "also made up")
    found = looks((*names, CENTRALIZED))
    markers = [found[name].marker for name in names]
    assert len(set(markers)) == len(markers)
    hatches = [found[name].hatch for name in registry()]
    assert len(set(hatches)) == len(hatches)
    lines = [(found[name].color, found[name].line) for name in (*registry(), CENTRALIZED)]
    assert len(set(lines)) == len(lines)
    # FedFusion's colour is its own, and each look is the same in every picture.
    own = found["fedfusion"].color
    assert [name for name, style in found.items() if style.color == own] == ["fedfusion"]
    assert looks(["ifca"])["ifca"] == found["ifca"]
