# SPDX-License-Identifier: Apache-2.0
"""What a row says of its run and keeps of its rounds, and the tables that are made of it."""

from __future__ import annotations

import platform
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedfusion_flwr.experiments.results import COSTS, compact, rounded, rounds_table
from fedfusion_flwr.experiments.rows import identity
from tests.experiments.folders import metrics

NAMES = (
    "global-accuracy",
    "global-loss",
    "personalized-loss",
    "adjusted-rand-index",
    "assignment-error",
    *COSTS,
)
VALUES = st.one_of(st.none(), st.integers(0, 3).map(float), st.floats(0, 1e9, width=32))
ROUNDS = st.lists(st.dictionaries(st.sampled_from(NAMES), VALUES), min_size=1, max_size=8)


@given(ROUNDS)
def test_rows_hold_what_was_measured(rounds: list[dict[str, Any]]) -> None:
    lines = [{"round": number, **values} for number, values in enumerate(rounds)]
    whole, kept = rounds_table([lines]), rounds_table([compact(lines)])
    assert list(kept.columns) == list(whole.columns)
    np.testing.assert_allclose(kept.to_numpy(float), whole.to_numpy(float), rtol=1e-4)
    # Whatever decides who is better is kept with all its digits.
    for name in ("global-accuracy", *COSTS):
        np.testing.assert_array_equal(kept[name], whole[name])


def test_little_is_written_of_rounds_that_are_alike() -> None:
    lines = metrics([0.1, 0.5, 0.6, 0.7], personalized=0.9)
    lines[2] |= {"seconds": {"train": 1.0}, "mixture": [0.5, 0.5], "global-loss": float("nan")}
    assert compact(lines) == {
        "round": [0, 1, 2, 3],
        "global-accuracy": [0.1, 0.5, 0.6, 0.7],
        "personalized-accuracy": {"3": 0.9},
        "global-loss": [2, 1, None, 0.5],
        "bytes-down": 3000,
        "bytes-up": 1000,
        "client-steps": 7,
    }


@pytest.mark.parametrize(
    ("value", "kept"),
    [(1 / 3, 0.333333), (1234567.0, 1234570), (0.0, 0), (float("inf"), None), (None, None)],
)
def test_significant_digits(value: float | None, kept: float | None) -> None:
    assert rounded(value) == kept


def test_the_machine_is_told_with_its_instructions() -> None:
    about = identity()
    assert (
        f"{platform.machine()} with {torch.backends.cpu.get_cpu_capability()}" in about["machine"]
    )
    assert about["torch"] == torch.__version__
    assert about["commit"]
