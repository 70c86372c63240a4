# SPDX-License-Identifier: Apache-2.0
"""Rows of measured feature bias: what is kept of many values, and what comes back."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest

from fedfusion_flwr.report.bias_rows import MOST_VALUES, Bias, BiasRow, RunningValues
from fedfusion_flwr.report.bias_store import FILE, BiasRows
from fedfusion_flwr.report.evidence import ReportError, Setting


def test_a_row_comes_back_as_it_was(tmp_path: Path) -> None:
    values = RunningValues.of(np.linspace(-3, 3, 1000), np.linspace(0, 1 / 3, 1000))
    distances = [[0.1, math.nan, 1 / 3]]
    row = BiasRow(
        Setting("mnist", "resnet18", "iid", "main"),
        3,
        Bias("fedavg", [1 / 7], [1e-300], distances, [math.nan]),
        values,
        ["a", "b"],
        "cell",
        "digest",
    )
    stored = BiasRows.read(tmp_path)
    stored.replace([row])
    text = (tmp_path / FILE).read_text()
    assert "NaN" not in text
    assert len(text) < 10_000
    (told,) = BiasRows.read(tmp_path).rows
    # NaN is not equal to itself.
    assert repr(told) == repr(row)
    assert dataclasses.asdict(values)["channels"] == 1000
    stored.replace([dataclasses.replace(row, digest="another")])
    (told,) = BiasRows.read(tmp_path).rows
    assert told.digest == "another"


def test_many_values_are_kept_as_quantiles() -> None:
    generator = np.random.default_rng(0)
    means, deviations = generator.normal(size=(2, 4800))
    kept = RunningValues.of(means, deviations)
    assert len(kept.means) == len(kept.deviations) == len(kept.shares) == MOST_VALUES
    assert kept.means == sorted(kept.means)
    np.testing.assert_allclose(kept.means, np.quantile(means, kept.shares), rtol=1e-5)
    assert kept.outside == np.mean(np.abs(np.concatenate([means, deviations])) > 2)
    few = RunningValues.of(means[:MOST_VALUES], deviations[:MOST_VALUES])
    np.testing.assert_allclose(few.means, np.sort(means[:MOST_VALUES]), rtol=1e-5)
    np.testing.assert_allclose(few.shares, (np.arange(MOST_VALUES) + 1) / MOST_VALUES)
    assert RunningValues.of(np.array([math.inf, 0.0]), np.ones(2)).means[0] == 0


def test_a_row_lacks_a_key() -> None:
    with pytest.raises(ReportError, match="lacks 'dataset'"):
        BiasRow.from_row({})
