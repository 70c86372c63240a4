# SPDX-License-Identifier: Apache-2.0
"""A cache folder of the test's own."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Not made yet."""
    folder = tmp_path_factory.mktemp("cached") / "cache"
    monkeypatch.setenv("FEDFUSION_CACHE", str(folder))
    return folder
