# SPDX-License-Identifier: Apache-2.0
"""Small data sets as files: IDX, image folders."""

from __future__ import annotations

import gzip
import os
from pathlib import Path

import numpy as np
from PIL import Image

SHARED = Path(os.environ.get("FEDFUSION_SHARED_DATA", Path(__file__).parents[3] / "shared/data"))
IDX_PREFIXES = {"train": 12, "t10k": 6}


def idx_bytes(array: np.ndarray) -> bytes:
    header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes()
    return header + array.astype(np.uint8).tobytes()


def write_idx_set(folder: Path, *, zipped: bool = False) -> None:
    """Twelve training and six test images of 4x3 pixels; image i has value i, label i % 10."""
    folder.mkdir(parents=True, exist_ok=True)
    for prefix, count in IDX_PREFIXES.items():
        numbers = np.arange(count)
        arrays = {
            "images-idx3": np.tile(numbers[:, None, None], (1, 4, 3)),
            "labels-idx1": numbers % 10,
        }
        for kind, array in arrays.items():
            content, name = idx_bytes(array), f"{prefix}-{kind}-ubyte"
            (folder / f"{name}{'.gz' * zipped}").write_bytes(
                gzip.compress(content) if zipped else content
            )


def image(value: int = 0, *, size: tuple[int, int] = (5, 4), mode: str = "RGB") -> Image.Image:
    """A plain one, (width, height)."""
    return Image.new(mode, size, (value,) * 3 if mode == "RGB" else value)


def write_tree(
    root: Path,
    classes: tuple[str, ...] = ("cat", "dog"),
    *,
    mode: str = "RGB",
    suffix: str = ".png",
) -> Path:
    """Two training and one test image a class; class c's training images are 20c and 20c + 10."""
    for position, name in enumerate(classes):
        for split, count in (("train", 2), ("test", 1)):
            folder = root / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                value = 20 * position + 10 * number
                image(value, mode=mode).save(folder / f"{number}{suffix}")
    return root
