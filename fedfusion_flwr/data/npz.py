# SPDX-License-Identifier: Apache-2.0
"""The user's own images as NumPy arrays: ``x_train y_train x_test y_test`` in one .npz file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from fedfusion_flwr.data.dataset import DataError, FederatedData
from fedfusion_flwr.data.imagefolder import pixel_moments
from fedfusion_flwr.data.roots import Moments, existing_root, read_classes, read_moments

_ARRAYS = ("x_train", "y_train", "x_test", "y_test")
_CHANNELS_LAST = (1, 3)


def npz(root: str) -> FederatedData:
    """The arrays of a .npz file.

    Images are (N, H, W), (N, H, W, C) if the last axis has length 1 or 3, or else (N, C, H, W).
    uint8 pixels are normalized by ``moments.txt`` beside the file, or by the moments of the
    training part; floating-point pixels are used as they are. ``classes.txt`` beside the file names
    the classes; without it there are as many as the largest label says.
    """
    path = _file(existing_root("npz", root))
    arrays = _read(path)
    x_train, x_test = (_images(path, name, arrays[name]) for name in ("x_train", "x_test"))
    y_train, y_test = (_labels(path, name, arrays[name]) for name in ("y_train", "y_test"))
    classes = read_classes(path.parent)
    num_classes = len(classes) or 1 + max(int(y.max(initial=0)) for y in (y_train, y_test))
    if num_classes < 2:
        raise DataError(f"{path} has labels of one class only; it needs at least two.")
    moments: Moments = (), ()
    if x_train.dtype == np.uint8:
        moments = read_moments(path.parent) or pixel_moments(x_train)
    train = (torch.from_numpy(x_train), torch.from_numpy(y_train))
    test = (torch.from_numpy(x_test), torch.from_numpy(y_test))
    return FederatedData(str(path), *train, *test, num_classes, *moments, classes=classes)


def _file(root: Path) -> Path:
    """The root itself, or in a folder ``data.npz`` or the only .npz file."""
    if root.is_file():
        return root
    found = sorted(root.glob("*.npz"))
    if root / "data.npz" in found:
        return root / "data.npz"
    if len(found) != 1:
        raise DataError(
            f"`data-root` {str(root)!r} holds {len(found)} .npz files; name the one to use, or "
            "call it data.npz."
        )
    return found[0]


def _read(path: Path) -> dict[str, np.ndarray]:
    try:
        with np.load(path, allow_pickle=False) as stored:
            found = stored.files
            arrays = {name: stored[name] for name in _ARRAYS if name in found}
    except Exception as problem:  # Damaged bytes raise almost anything.
        raise DataError(
            f"{path} cannot be read as a .npz file of plain arrays ({problem}); write it with "
            "np.savez."
        ) from problem
    missing = [name for name in _ARRAYS if name not in arrays]
    if missing:
        raise DataError(
            f"{path} lacks {', '.join(missing)}; it holds {', '.join(found) or 'none'}."
        )
    return arrays


def _images(path: Path, name: str, x: np.ndarray) -> np.ndarray:
    """Images as (N, C, H, W), uint8 or float32."""
    if x.dtype not in (np.uint8, np.float32, np.float64):
        raise DataError(
            f"{name} in {path} is {x.dtype}; save pixels as uint8, or as float32 or float64 that "
            "are used as they are."
        )
    if x.ndim not in (3, 4) or 0 in x.shape:
        raise DataError(
            f"{name} in {path} has shape {x.shape}; images are (N, H, W), (N, C, H, W), or "
            "(N, H, W, C) with C 1 or 3, and texts need a `dataset` of your own."
        )
    if x.ndim == 3:
        x = x[:, None]
    elif x.shape[-1] in _CHANNELS_LAST:
        x = x.transpose(0, 3, 1, 2)
    with np.errstate(over="ignore"):
        x = np.ascontiguousarray(x, dtype=np.uint8 if x.dtype == np.uint8 else np.float32)
    if not np.isfinite(x).all():
        raise DataError(f"{name} in {path} has values that are not finite float32; replace them.")
    return x


def _labels(path: Path, name: str, y: np.ndarray) -> np.ndarray:
    if y.dtype.kind not in "iu" or y.ndim != 1:
        raise DataError(
            f"{name} in {path} is {y.dtype} of shape {y.shape}; labels are whole numbers of "
            "shape (N,)."
        )
    return y.astype(np.int64)
