# SPDX-License-Identifier: Apache-2.0
"""``python -m fedfusion_flwr.data.partition``: the table, the numbers and the figure."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fedfusion_flwr import RunConfig
from fedfusion_flwr.data import data_for, partition_for
from fedfusion_flwr.data.partition.__main__ import PartitionOverview, main
from tests.data.partition.small import fresh_process

OVERRIDES = 'partition="dirichlet" num-clients=20 dirichlet-alpha=0.3 seed=4'
CONFIG = RunConfig(partition="dirichlet", num_clients=20, dirichlet_alpha=0.3, seed=4)


def overview(counts: list[list[int]], **fields: Any) -> PartitionOverview:
    table = np.array(counts)
    fields = {"available": table.sum(0), "classes": ("a", "b")} | fields
    return PartitionOverview(RunConfig(), table, **fields)


def test_table_and_summary() -> None:
    """Shares (1, 0) and (1/4, 3/4) against the whole's (1/2, 1/2): distances 1/2 and 1/4."""
    given = overview([[4, 0], [2, 6]], available=np.array([8, 8]), components=np.array([1, 0]))
    assert given.label_skew == pytest.approx(3 / 8)
    assert given.table().splitlines() == [
        "client  examples  component  classes  a  b",
        "     0         4          1        1  4  0",
        "     1         8          0        2  2  6",
        "",
        "components partition of mnist-5k, seed 0: 2 clients, 12 of 16 training examples",
        "examples per client: min 4, median 6, max 8",
        "classes per client: min 1, median 1.5, max 2",
        "label skew: 0.375 (mean total variation distance of a client's labels from all labels; "
        "0 is none)",
    ]


def test_long_names_become_a_legend_and_many_classes_a_number() -> None:
    named = overview([[1, 2]], classes=("a very long name", "client")).table().splitlines()
    assert named[0].split() == ["client", "examples", "classes", "0", "1"]
    assert named[3] == "classes: 0 a very long name, 1 client"
    many = overview([[1] * 21], classes=tuple(map(str, range(21)))).table().splitlines()
    assert many[1].split() == ["0", "21", "21"]


def test_program_shows_what_a_run_gives(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    numbers = tmp_path / "numbers.json"
    assert main([OVERRIDES, "--json", str(numbers)]) == 0
    lines = capsys.readouterr().out.splitlines()
    stored = json.loads(numbers.read_text(encoding="utf-8"))
    labels = data_for(CONFIG).y_train.numpy()
    for client, part in enumerate(partition_for(CONFIG).indices):
        counts = np.bincount(labels[part], minlength=10).tolist()
        row = stored["clients"][client]
        assert row == {"client": client, "examples": len(part), "counts": counts}
        assert lines[client + 1].split()[3:] == [str(n) for n in counts]
    assert RunConfig.from_run_config(stored["config"]) == CONFIG
    assert stored["examples"]["max"] == max(row["examples"] for row in stored["clients"])
    assert 0.2 < stored["label-skew"] < 0.9


def test_planted_components_are_in_the_numbers(tmp_path: Path) -> None:
    numbers = tmp_path / "numbers.json"
    assert main(["--json", str(numbers)]) == 0
    rows = json.loads(numbers.read_text(encoding="utf-8"))["clients"]
    assert sorted(row["component"] for row in rows) == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]


def test_figures(tmp_path: Path) -> None:
    """Repeatable, and of its own size for a hundred clients."""
    few, many = PartitionOverview.of(CONFIG), overview([[1, 2]] * 100)
    for suffix in (".svg", ".png"):
        for name in ("a", "b"):
            few.draw(tmp_path / f"{name}{suffix}")
        first, second = (tmp_path / f"{name}{suffix}" for name in ("a", "b"))
        assert first.read_bytes() == second.read_bytes()
    many.draw(tmp_path / "many.png")
    with Image.open(tmp_path / "a.png") as small, Image.open(tmp_path / "many.png") as wide:
        assert wide.width > small.width > 800
    assert "20 clients, 4000 of 4000 training examples" in (tmp_path / "a.svg").read_text()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["partition=dirichlet"], "invalid format"),
        (["seed=1 num-clients 20"], "'num-clients 20' is no run-config override"),
        (["num-clents=3"], "did you mean 'num-clients'?"),
        (['partition="pathological" classes-per-client=11'], "`classes-per-client` is 11"),
        (['dataset="npz" data-root="/no/such/place"'], "does not exist on this machine"),
        (["--output", "figure.pdf"], "figure.pdf must end in .svg or .png"),
        (["--json", "/no/such/place/numbers.json"], "No such file or directory"),
        (["/no/such/place.toml"], "No such file or directory"),
    ],
)
def test_what_is_wrong_is_one_sentence(
    arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert sentence in error


def test_in_another_process_it_says_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    printed = fresh_process("-m", "fedfusion_flwr.data.partition", OVERRIDES)
    main([OVERRIDES])
    assert printed == capsys.readouterr().out
