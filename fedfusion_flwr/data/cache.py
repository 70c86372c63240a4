# SPDX-License-Identifier: Apache-2.0
"""Decoded arrays kept on disk: every simulation actor is a new process that would decode again."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np

from fedfusion_flwr.atomic import writing

_DIGEST = "__sha256__"


def cache_directory() -> Path:
    """The folder of cached arrays: ``$FEDFUSION_CACHE``, or ``~/.cache/fedfusion``."""
    return Path(os.environ.get("FEDFUSION_CACHE") or "~/.cache/fedfusion").expanduser()


def cached_arrays(key: str, build: Callable[[], dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """The arrays of ``build`` by name, read from disk if an earlier process left them there.

    A missing, damaged or unwritable cache is never an error: the arrays are built again. Several
    processes may build at once; the last to finish wins.

    Parameters
    ----------
    key : str
        Plain file name without suffix; must change whenever the result of ``build`` would.
    build : Callable[[], dict[str, np.ndarray]]
        Makes the arrays; no object arrays.
    """
    try:
        path = cache_directory() / f"{key}.npz"
    except RuntimeError:  # No home folder to expand.
        return build()
    arrays = _read(path)
    if arrays is None:
        arrays = build()
        # The digest is inside the file, so that both appear at once.
        stored = {**arrays, _DIGEST: np.array(_digest(arrays))}
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            with writing(path) as file:
                np.savez(file, allow_pickle=False, **stored)
    return arrays


def _digest(arrays: dict[str, np.ndarray]) -> str:
    digest = hashlib.sha256()
    for name in sorted(arrays):
        value = np.ascontiguousarray(arrays[name])
        digest.update(f"{name} {value.dtype.str} {value.shape};".encode())
        digest.update(value.data)
    return digest.hexdigest()


def _read(path: Path) -> dict[str, np.ndarray] | None:
    try:
        with np.load(path, allow_pickle=False) as stored:
            arrays = dict(stored)
        expected = str(arrays.pop(_DIGEST))
    except Exception:  # noqa: BLE001 - damaged bytes raise almost anything, and are rebuilt
        return None
    return arrays if _digest(arrays) == expected else None
