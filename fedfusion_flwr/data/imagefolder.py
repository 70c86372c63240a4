# SPDX-License-Identifier: Apache-2.0
"""Image files in ``train/<class>/`` and ``test/<class>/``, decoded once and cached on disk."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from PIL import __version__ as pillow_version

from fedfusion_flwr.data.augmentation import CROP_AND_FLIP
from fedfusion_flwr.data.cache import cached_arrays
from fedfusion_flwr.data.dataset import DataError, FederatedData
from fedfusion_flwr.data.roots import (
    CLASSES_FILE,
    Moments,
    existing_root,
    read_classes,
    read_moments,
)

_SUFFIXES = (".jpg", ".jpeg", ".png")
_GREY_MODES = ("1", "L")
_COLOUR_MODES = ("RGB", "RGBA", "P", "LA", "PA", "CMYK", "YCbCr")
_MOST_THREADS = 4
_PIECE = 512
_FORMAT = 1
"""Part of the cache's key: raise it with every change of how files are decoded."""


def imagefolder(root: str) -> FederatedData:
    """Images of one size, grey if all of them are, else RGB; classes are folder names, sorted.

    ``classes.txt`` in the root fixes the classes and their order instead; then a split may lack
    some of them. ``moments.txt`` fixes what pixels are normalized by, instead of the moments of
    the training part.
    """
    folder = existing_root("imagefolder", root)
    listed = read_classes(folder)
    train, test = (_files(folder / split, listed) for split in ("train", "test"))
    files, cut = train + test, len(train)
    names = [path.parent.name for path in files]
    classes = listed or _classes(folder, set(names[:cut]), set(names[cut:]))
    arrays = cached_arrays(_key(folder, files), lambda: _decode(files, cut))
    pixels = torch.from_numpy(arrays["pixels"])
    labels = torch.tensor([classes.index(name) for name in names])
    mean, std = read_moments(folder) or (arrays["mean"].tolist(), arrays["std"].tolist())
    splits = (pixels[:cut], labels[:cut], pixels[cut:], labels[cut:])
    moments = (tuple(mean), tuple(std))
    return FederatedData("imagefolder", *splits, len(classes), *moments, CROP_AND_FLIP, classes)


def _files(folder: Path, listed: Sequence[str]) -> list[Path]:
    """The image files of a split, sorted by class and name."""
    if not folder.is_dir():
        raise DataError(
            f"{folder} is not a folder; image folders are laid out as "
            f"{folder.name}/<class>/<image>.jpg or .png, with both train/ and test/."
        )
    files: list[Path] = []
    for entry in _visible(folder):
        if not entry.is_dir():
            raise DataError(f"{entry} lies directly in {folder.name}/; move it to a class folder.")
        if listed and entry.name not in listed:
            raise DataError(f"{entry} is a class that {CLASSES_FILE} lacks; add it there.")
        images = _visible(entry)
        if not images:
            raise DataError(f"{entry} is an empty class folder; give it images or remove it.")
        for image in images:
            if image.suffix.lower() not in _SUFFIXES or image.is_dir():
                raise DataError(
                    f"{image} is not a .jpg, .jpeg or .png file; convert it or move it away."
                )
        files += images
    if not files:
        raise DataError(f"{folder} holds no class folder; make one for each class.")
    return files


def _visible(folder: Path) -> list[Path]:
    """The entries of a folder, sorted by name, without hidden files such as .DS_Store."""
    return sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))


def _classes(folder: Path, train: set[str], test: set[str]) -> tuple[str, ...]:
    remedy = f"or name all classes in {folder / CLASSES_FILE}, one a line, in one order everywhere"
    if len(train) < 2:
        raise DataError(f"{folder / 'train'} holds one class only; give it at least two, {remedy}.")
    for name in sorted(train ^ test):
        lacking = "test" if name in train else "train"
        raise DataError(
            f"Class {name!r} has no folder in {folder / lacking}; both splits need the same "
            f"classes, {remedy}."
        )
    return tuple(sorted(train))


def _key(folder: Path, files: Sequence[Path]) -> str:
    """Changes with the name, size or time of any file, and with what decodes them."""
    digest = hashlib.sha256(f"{_FORMAT} {pillow_version} {folder.resolve()}".encode())
    for path in files:
        try:
            status = path.stat()
        except OSError as problem:
            raise DataError(f"{path} cannot be read ({problem}); repair or remove it.") from problem
        name = os.fsencode(path.relative_to(folder))
        digest.update(b"\0%b %d %d" % (name, status.st_size, status.st_mtime_ns))
    return f"imagefolder-{digest.hexdigest()[:32]}"


def _decode(files: Sequence[Path], num_train: int) -> dict[str, np.ndarray]:
    """Pixels (N, C, H, W) uint8, and mean and std (C,) of the first ``num_train`` of them."""
    first, _ = _read(files[0])
    pixels = np.empty((len(files), 3, *first.shape[1:]), np.uint8)

    def decode(position: int) -> bool:
        image, grey = _read(files[position])
        if image.shape != first.shape:
            size, other = (f"{i.shape[2]}x{i.shape[1]}" for i in (image, first))
            raise DataError(
                f"{files[position]} is {size} pixels, but {files[0]} is {other}: images are not "
                "resized here, because how is yours to choose; bring all to one size first."
            )
        pixels[position] = image
        return grey

    # Pillow lets other threads run while it decodes. In order, so that the first odd file is named.
    with ThreadPool(min(_MOST_THREADS, os.cpu_count() or 1)) as pool:
        all_grey = all(list(pool.imap(decode, range(len(files)), chunksize=64)))
    if all_grey:
        pixels = pixels[:, :1].copy()
    mean, std = pixel_moments(pixels[:num_train])
    return {"pixels": pixels, "mean": np.array(mean), "std": np.array(std)}


def _read(path: Path) -> tuple[np.ndarray, bool]:
    """One image as RGB, (3, H, W) uint8, and whether it is grey."""
    try:
        with Image.open(path) as image:
            image.load()
            mode = image.mode
            rgb = np.asarray(image.convert("RGB"))
    except Exception as problem:  # Damaged files raise almost anything.
        raise DataError(
            f"{path} cannot be decoded as an image ({problem}); repair or remove it."
        ) from problem
    if mode not in _GREY_MODES + _COLOUR_MODES:
        raise DataError(f"{path} has pixels of mode {mode}; save it with 8 bits a channel.")
    return rgb.transpose(2, 0, 1), mode in _GREY_MODES


def pixel_moments(pixels: np.ndarray) -> Moments:
    """Mean and standard deviation of uint8 images (N, C, H, W), scaled to [0, 1], each (C,)."""
    levels = np.arange(256) / 255
    counts = np.zeros((pixels.shape[1], 256), np.int64)
    # In pieces: bincount makes eight bytes of each pixel.
    for start in range(0, len(pixels), _PIECE):
        channels = pixels[start : start + _PIECE].swapaxes(0, 1)
        counts += [np.bincount(channel.ravel(), minlength=256) for channel in channels]
    shares = counts / counts.sum(1, keepdims=True)
    mean = shares @ levels
    std = np.sqrt((shares * (levels - mean[:, None]) ** 2).sum(1))
    return tuple(mean.tolist()), tuple(std.tolist())
