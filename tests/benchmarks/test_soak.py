# SPDX-License-Identifier: Apache-2.0
"""The soak in small, and what docs/deploy.md says of the stored one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks import soak
from fedfusion_flwr.experiments.rows import read_rows

DEPLOY = (Path(__file__).parents[2] / "docs" / "deploy.md").read_text(encoding="utf-8")


def check_accounts(books: dict[str, Any]) -> None:
    """Every round balances, and what was dropped is just what was made to fail."""
    assert books["rounds-balanced"] == books["rounds"]
    assert books["dropped"] == {k: v for k, v in books["planned"].items() if v}
    assert books["sampled"] == books["valid"] + sum(books["dropped"].values())
    assert books["evaluations-dropped"] == books["evaluations-planned"] > 0


def test_ten_rounds_with_ten_clients() -> None:
    row = soak.soak({**soak.CONFIG, "num-server-rounds": 10, "num-clients": 10})
    check_accounts(row["accounts"])
    assert row["accounts"]["rounds"] == 10
    assert row["accounts"]["sampled"] == 100
    assert sum(row["accounts"]["dropped"].values()) > 5
    assert row["resumed-to-round"] == 11
    assert len(row["megabytes"]) == 10
    assert min(row["megabytes"]) > 0


def test_the_stored_soak_is_whole_and_flat() -> None:
    (row,) = read_rows(soak.RESULTS)
    assert row["config"] == soak.CONFIG
    check_accounts(row["accounts"])
    assert row["accounts"]["rounds"] == len(row["megabytes"]) == 200
    assert row["memory"] == soak.memory(row["megabytes"])
    assert row["memory"]["flat"]
    assert row["resumed-to-round"] == 201


def test_docs_say_what_the_stored_soak_says() -> None:
    assert soak.sentence() in DEPLOY.replace("\n", " ")


@pytest.mark.parametrize(
    ("late", "flat"), [(100.0, True), (104.0, True), (106.0, False), (90.0, True)]
)
def test_flat_is_at_most_five_percent_above_the_second_quarter(late: float, flat: bool) -> None:
    # The first quarter does not count; its 10 MiB would make any later value a leak.
    judged = soak.memory([10.0] * 5 + [100.0] * 5 + [101.0] * 5 + [late] * 5)
    assert judged == {"second-quarter": 100.0, "last-quarter": late, "flat": flat}
