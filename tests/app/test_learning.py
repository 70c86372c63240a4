# SPDX-License-Identifier: Apache-2.0
"""The benchmark of what each data set and model reaches, and its stored rows."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from benchmarks import learning
from fedfusion_flwr import RunConfig
from fedfusion_flwr.experiments.rows import read_rows


@pytest.mark.parametrize("name", learning.CASES)
def test_every_case_is_a_valid_run(name: str) -> None:
    RunConfig.from_run_config({**learning.SHARED, **learning.CASES[name].config})


def test_stored_runs_are_of_the_cases_and_reach_their_targets() -> None:
    rows = read_rows(learning.RESULTS)
    assert "bilstm-sentiment140" in {row["case"] for row in rows}
    for row in rows:
        case = learning.CASES[row["case"]]
        assert row["config"] == {**learning.SHARED, **case.config, "seed": row["seed"]}
        assert len(row["accuracy"]) == row["config"]["num-server-rounds"] + 1
        assert row["final-accuracy"] >= (case.target or 0)


def test_resnet18_clearly_beats_lenet_with_enough_data() -> None:
    final = {row["case"]: row["final-accuracy"] for row in read_rows(learning.RESULTS)}
    assert final["resnet18-cifar10-larger"] - final["lenet-cifar10-larger"] > 0.05
    text = (Path(__file__).parents[2] / "docs" / "models.md").read_text(encoding="utf-8")
    for images, suffix in (("10,000, two", "-larger"), ("5,000, four", "")):
        figures = [f"{final[f'{model}-cifar10{suffix}']:.3f}" for model in ("resnet18", "lenet")]
        assert f"| {images} clients | {figures[0]} | {figures[1]} |" in text


def test_cases_without_a_root_and_stored_cases_are_left_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    started: list[tuple[str, int]] = []
    monkeypatch.setattr(
        learning, "run_in_processes", lambda cells, options, workers: started.extend(cells)
    )
    monkeypatch.setattr(
        learning, "read_rows", lambda path: [{"case": "resnet18-cifar10", "seed": 0}]
    )
    learning.run_missing({"cifar10": Path("/images")}, workers=1)
    names = ("lenet-cifar10", "resnet18-cifar10-larger", "lenet-cifar10-larger")
    assert started == [(name, 0) for name in names]
    printed = capsys.readouterr().out
    assert "bilstm-sentiment140 | needs --data-root sentiment140=PATH" in printed
    assert "cifar10 | needs" not in printed


def test_subset_of_an_image_folder(tmp_path: Path) -> None:
    for kind in ("train/cat", "train/dog", "test/cat", "test/dog"):
        (tmp_path / "all" / kind).mkdir(parents=True)
        for number in range(5):
            (tmp_path / "all" / kind / f"{number}.jpg").write_text(kind)
    (tmp_path / "few").mkdir()
    folder = learning.copy_subset(tmp_path / "all", tmp_path / "few", (2, 1))
    assert folder == tmp_path / "few"
    copied = sorted(str(path.relative_to(folder)) for path in folder.rglob("*.jpg"))
    kinds = [("test/cat", 1), ("test/dog", 1), ("train/cat", 2), ("train/dog", 2)]
    assert copied == [f"{kind}/{number}.jpg" for kind, count in kinds for number in range(count)]
    assert (folder / "train/dog/1.jpg").read_text() == "train/dog"


@pytest.mark.parametrize("argument", ["sentiment140", "tweets=/data"])
def test_unknown_roots_are_refused(argument: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="is not NAME=PATH, NAME one of"):
        learning._root(argument)
