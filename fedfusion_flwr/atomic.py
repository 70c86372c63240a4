# SPDX-License-Identifier: Apache-2.0
"""Files that appear whole or not at all."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

PART = ".part"
"""Suffix of a file that is being written; only a killed process leaves one behind."""


@contextlib.contextmanager
def writing(path: Path) -> Iterator[BinaryIO]:
    """Write a file aside, sync it and rename it, so that nobody ever sees half of it.

    It is written in the same folder, where renaming is atomic. Several processes may write the same
    file at once; the last to finish wins.
    """
    aside = path.with_name(f".{path.name}.{secrets.token_hex(8)}{PART}")
    try:
        with aside.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
