# SPDX-License-Identifier: Apache-2.0
"""Where a data set's files lie: ``data-root``, and the class names that may lie in it."""

from __future__ import annotations

from pathlib import Path

from fedfusion_flwr.data.cache import cache_directory
from fedfusion_flwr.data.dataset import DataError

CLASSES_FILE = "classes.txt"
MOMENTS_FILE = "moments.txt"

Moments = tuple[tuple[float, ...], tuple[float, ...]]
"""Mean and standard deviation of pixels in [0, 1], one number per channel."""


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
    lines = _lines(path)
    if lines is None:
        return ()
    names = tuple(lines)
    repeated = next((name for name in names if names.count(name) > 1), None)
    if repeated is not None:
        raise DataError(f"{path} names class {repeated!r} twice; leave one line of the two.")
    if len(names) < 2:
        raise DataError(f"{path} must name at least two classes, one a line; it has {len(names)}.")
    return names


def read_moments(folder: Path) -> Moments | None:
    """The pixels' moments in ``moments.txt``: a line of means, then one of deviations; or none.

    Raises
    ------
    DataError
        If the file is not that.
    """
    path = folder / MOMENTS_FILE
    lines = _lines(path)
    if lines is None:
        return None
    try:
        mean, std = (tuple(float(number) for number in line.split()) for line in lines)
    except ValueError as problem:
        raise DataError(
            f"{path} must hold two lines, the mean and the standard deviation of each channel; "
            "copy it from the run directory."
        ) from problem
    return mean, std


def moments_lines(mean: tuple[float, ...], std: tuple[float, ...]) -> list[str]:
    """What `read_moments` reads."""
    return [" ".join(map(repr, numbers)) for numbers in (mean, std)]


def read_text(path: Path) -> str | None:
    """A text file's content; None where there is no such file.

    Raises
    ------
    DataError
        If it is not UTF-8 text.
    """
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as problem:
        raise DataError(f"{path} cannot be read as UTF-8 text ({problem}).") from problem


def _lines(path: Path) -> list[str] | None:
    """The lines that are not blank, stripped; None where there is no such file."""
    text = read_text(path)
    return None if text is None else [line.strip() for line in text.splitlines() if line.strip()]
