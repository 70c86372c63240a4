# SPDX-License-Identifier: Apache-2.0
"""Fixtures that several folders of tests share."""

import pytest


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """The data and networks of `tests.strategies.small`, under names that a run config knows."""
    # Imported here: most tests do not need it.
    from tests.strategies.small import install

    install(monkeypatch)
