# SPDX-License-Identifier: Apache-2.0
"""Where a data set's files lie: ``data-root``."""

from __future__ import annotations

from pathlib import Path

from fedfusion_flwr.data.cache import cache_directory
from fedfusion_flwr.data.dataset import DataError


def data_folder(root: str) -> Path:
    """``data-root`` as a path, or ``data`` in the cache folder where it is empty.

    Raises
    ------
    DataError
        If it is relative, or begins with a ``~`` that stands for no home folder.
    """
    try:
        path = Path(root).expanduser() if root else cache_directory() / "data"
    except RuntimeError as problem:
        raise DataError(
            f"`data-root` is {root!r}, and no home folder is known here; give an absolute path."
        ) from problem
    if not path.is_absolute():
        raise DataError(
            f"`data-root` is {root!r}, a relative path, which means nothing here: Flower runs the "
            "app from a folder of its own; give an absolute path."
        )
    return path
