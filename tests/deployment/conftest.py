# SPDX-License-Identifier: Apache-2.0
from collections.abc import Iterator

import pytest

from tests.deployment.harness import Deployment


@pytest.fixture(scope="session")
def deployment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    """A SuperLink and three SuperNodes with TLS and authentication, shared by the tests."""
    with Deployment(tmp_path_factory.mktemp("deployment")) as deployment:
        yield deployment
