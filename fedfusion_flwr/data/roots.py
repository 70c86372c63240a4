# SPDX-License-Identifier: Apache-2.0
"""Where a data set's files lie, and the small text files that may lie beside them.

Whatever is wrong with them is a `DataError`.
"""

from __future__ import annotations

from pathlib import Path

from fedfusion_flwr.data.cache import cache_directory
from fedfusion_flwr.data.dataset import DataError

CLASSES_FILE = "classes.txt"
MOMENTS_FILE = "moments.txt"

Moments = tuple[tuple[float, ...], tuple[float, ...]]
"""Mean and standard deviation of pixels in [0, 1], one number per channel."""


def data_folder(root: str) -> Path:
    """``data-root`` as an absolute path; if empty, ``data`` in the cache folder."""
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
    """``data-root`` of a data set that cannot be downloaded; `DataError` if it does not exist."""
    if not root:
        raise DataError(f"`dataset` {dataset!r} needs `data-root`, an absolute path to its files.")
    path = data_folder(root)
    if not path.exists():
        raise DataError(f"`data-root` {root!r} does not exist on this machine.")
    return path


def read_classes(folder: Path) -> tuple[str, ...]:
    """The class names in ``classes.txt``, one a line in the order of their labels; () without it.

    At least two, and none twice.
    """
    path = folder / CLASSES_FILE
    lines = _lines(path)
    if lines is None:
        return ()
    repeated = next((name for name in lines if lines.count(name) > 1), None)
    if repeated is not None:
        raise DataError(f"{path} names class {repeated!r} twice; leave one line of the two.")
    if len(lines) < 2:
        raise DataError(f"{path} must name at least two classes, one a line; it has {len(lines)}.")
    return tuple(lines)


def read_moments(folder: Path) -> Moments | None:
    """The moments in ``moments.txt``, a line of means and one of deviations; None without it."""
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
    """The content of a UTF-8 text file; None if there is no such file."""
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as problem:
        raise DataError(f"{path} cannot be read as UTF-8 text ({problem}).") from problem


def _lines(path: Path) -> list[str] | None:
    """The lines that are not blank, stripped; None if there is no such file."""
    text = read_text(path)
    return None if text is None else [line.strip() for line in text.splitlines() if line.strip()]
