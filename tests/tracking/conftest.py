# SPDX-License-Identifier: Apache-2.0
"""Fixtures for the tests of callbacks."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedfusion_flwr.tracking import RunDirectory


@pytest.fixture
def directory(tmp_path: Path) -> RunDirectory:
    return RunDirectory(tmp_path / "run")
