# SPDX-License-Identifier: Apache-2.0
"""What the tests of callbacks share."""

from __future__ import annotations

import logging
from typing import Any

import pytest
from flwr.common.logger import FLOWER_LOGGER


@pytest.fixture
def shown() -> Any:
    """Messages that Flower's logger lets through."""
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    level = FLOWER_LOGGER.level
    FLOWER_LOGGER.addHandler(handler)
    FLOWER_LOGGER.setLevel(logging.INFO)
    yield messages
    FLOWER_LOGGER.removeHandler(handler)
    FLOWER_LOGGER.setLevel(level)
