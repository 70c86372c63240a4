# SPDX-License-Identifier: Apache-2.0
"""One suite that was really run and its report, made once for all tests that look at them."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedfusion_flwr.experiments.page import write_report
from tests.experiments.folders import run_suite, write_small_images


@pytest.fixture(scope="session")
def real_suite(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a suite of eight runs, and its report in ``report/``."""
    root = tmp_path_factory.mktemp("suite")
    write_small_images(root / "stripes.npz")
    folder = run_suite(root / "results", root / "stripes.npz")
    assert write_report(folder) == folder / "report" / "index.html"
    return folder
