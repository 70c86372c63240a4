# SPDX-License-Identifier: Apache-2.0
"""Settings and fixtures of the whole suite; pytest reads this before any test imports torch."""

import os

import pytest

WORKERS = os.environ.get("PYTEST_XDIST_WORKER_COUNT")
if WORKERS is not None:
    # By default torch uses all cores in every worker, and their threads wait for each other.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // int(WORKERS))))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Start the longest files first: at the end one of two workers would wait for them."""
    marks = ("engine", "slow")
    items.sort(key=lambda item: [item.get_closest_marker(mark) is None for mark in marks])


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """The data and networks of `tests.strategies.small`, under names that a run config knows."""
    # Imported here: most tests do not need it.
    from tests.strategies.small import install

    install(monkeypatch)
