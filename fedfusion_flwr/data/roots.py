# SPDX-License-Identifier: Apache-2.0
"""Where a data set's files lie: ``data-root``, and the class names that may lie in it."""

from __future__ import annotations

from pathlib import Path

from fedfusion_flwr.data.cache import cache_directory
from fedfusion_flwr.data.dataset import DataError

CLASSES_FILE = "classes.txt"


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


def existing_root(dataset: str, root: str) -> Path:
    """``data-root`` of a data set that nobody but the user has.

    Raises
    ------
    DataError
        If it is empty, relative or does not exist.
    """
    if not root:
        raise DataError(f"`dataset` {dataset!r} needs `data-root`, an absolute path to its files.")
    path = data_folder(root)
    if not path.exists():
        raise DataError(f"`data-root` {root!r} does not exist on this machine.")
    return path


def read_classes(folder: Path) -> tuple[str, ...]:
    """The class names in ``classes.txt``, one a line, in the order of their labels; or none.

    Raises
    ------
    DataError
        If the file is not text, names fewer than two classes, or one twice.
    """
    path = folder / CLASSES_FILE
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return ()
    except (OSError, UnicodeDecodeError) as problem:
        raise DataError(f"{path} cannot be read as UTF-8 text ({problem}).") from problem
    names = tuple(line.strip() for line in lines if line.strip())
    repeated = next((name for name in names if names.count(name) > 1), None)
    if repeated is not None:
        raise DataError(f"{path} names class {repeated!r} twice; leave one line of the two.")
    if len(names) < 2:
        raise DataError(f"{path} must name at least two classes, one a line; it has {len(names)}.")
    return names
