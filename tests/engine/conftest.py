# SPDX-License-Identifier: Apache-2.0
from collections.abc import Iterator

import pytest

from tests.engine.harness import Engine


@pytest.fixture(scope="session")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """Flower's engine with its own home, ports and SuperLink, so that workers do not meet."""
    engine = Engine(tmp_path_factory.mktemp("engine"))
    try:
        yield engine
    finally:
        engine.stop()
