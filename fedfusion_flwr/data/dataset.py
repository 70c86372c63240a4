# SPDX-License-Identifier: Apache-2.0
"""What a loaded data set is: tensors of examples, and what training must know about them."""

from __future__ import annotations

import functools
import hashlib
import itertools
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from fedfusion_flwr.data.augmentation import NO_AUGMENTATION, Augmentation
from fedfusion_flwr.errors import FedFusionError

_TEXT_DIMENSIONS = 2
_DTYPES = {4: (torch.uint8, torch.float32), _TEXT_DIMENSIONS: (torch.int64,)}
"""By the number of dimensions of all examples of a split."""


class DataError(FedFusionError, ValueError):
    """An unknown data set, or files or arrays that are not what a data set must hold."""


@dataclass(frozen=True, eq=False)
class FederatedData:
    """A data set before it is divided among clients. The tensors are shared: do not change them.

    Attributes
    ----------
    name : str
        For messages.
    x_train, x_test : Tensor
        Images (N, C, H, W), either uint8 pixels, normalized by `inputs` when they are used, or
        float32, used as they are. Or texts (N, L), int64 word numbers padded with 0.
    y_train, y_test : Tensor
        Labels in [0, num_classes), (N,), int64.
    num_classes : int
        Number of classes, at least 1.
    mean, std : tuple[float, ...]
        Of the pixels in [0, 1], one number per channel; required for uint8 images.
    augmentation : Augmentation
        What training may do to the images.
    classes : tuple[str, ...]
        Names of the classes in the order of their labels; empty if they have none.
    vocabulary : tuple[str, ...]
        For texts, the words in the order of their numbers; 0 is padding, 1 the unknown word.
    users : np.ndarray or None
        Who wrote each training example, (N,), for the partition by user.

    Raises
    ------
    DataError
        If shapes, types or labels do not fit.
    """

    name: str
    x_train: Tensor
    y_train: Tensor
    x_test: Tensor
    y_test: Tensor
    num_classes: int
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    augmentation: Augmentation = NO_AUGMENTATION
    classes: tuple[str, ...] = ()
    vocabulary: tuple[str, ...] = ()
    users: np.ndarray | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        self._check_split("train", self.x_train, self.y_train)
        self._check_split("test", self.x_test, self.y_test)
        name = f"Data set {self.name!r}"
        one, other = ((tuple(x.shape[1:]), x.dtype) for x in (self.x_train, self.x_test))
        if one != other:
            raise DataError(
                f"Both splits of data set {self.name!r} must have examples of one shape and type, "
                f"got {one} and {other}."
            )
        if self.x_train.dtype == torch.uint8:
            channels = self.x_train.shape[1]
            if {len(self.mean), len(self.std)} != {channels} or min(self.std) <= 0:
                raise DataError(
                    f"{name} has uint8 images of {channels} channels: it needs a mean and a "
                    f"positive std for each, got {self.mean} and {self.std}."
                )
        if self.classes and len(self.classes) != self.num_classes:
            raise DataError(
                f"{name} has {self.num_classes} classes and {len(self.classes)} class names."
            )
        if self.is_text and len(self.vocabulary) <= (largest := int(self.x_train.max())):
            raise DataError(
                f"{name} has word number {largest}, but only {len(self.vocabulary)} words in its "
                "vocabulary."
            )
        if self.users is not None and self.users.shape != (len(self.y_train),):
            raise DataError(f"{name} must name one user for each train example.")

    def _check_split(self, split: str, x: Tensor, y: Tensor) -> None:
        where = f"The {split} split of data set {self.name!r}"
        if x.dtype not in _DTYPES.get(x.dim(), ()):
            raise DataError(
                f"{where} must hold uint8 or float32 images of shape (N, C, H, W) or int64 texts "
                f"of shape (N, L), got {x.dtype} of shape {tuple(x.shape)}."
            )
        if y.shape != x.shape[:1] or y.dtype != torch.int64 or len(y) == 0:
            raise DataError(
                f"{where} must hold one int64 label for each of its {len(x)} examples and at "
                f"least one example, got {y.dtype} of shape {tuple(y.shape)}."
            )
        low, high = int(y.min()), int(y.max())
        if low < 0 or high >= self.num_classes:
            raise DataError(
                f"{where} must have labels from 0 to {self.num_classes - 1}, "
                f"got labels from {low} to {high}."
            )

    @property
    def is_text(self) -> bool:
        """Whether the examples are texts, not images."""
        return self.x_train.dim() == _TEXT_DIMENSIONS

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of an example: (channels, height, width), or (length,) of a text."""
        return tuple(self.x_train.shape[1:])

    @functools.cached_property
    def signature(self) -> str:
        """All that a model trained on this data depends on, and nothing of the examples.

        Nodes that hold different parts of one data set have the same signature;
        `signature_difference` says in what two of them differ.
        """
        names, words = (
            hashlib.sha256(repr(part).encode()).hexdigest()[:16]
            for part in (self.classes, self.vocabulary)
        )
        shape = "x".join(map(str, self.input_shape))
        return f"{shape} {self.num_classes} {names} {words}"

    def inputs(self, x: Tensor) -> Tensor:
        """Examples as a model takes them: uint8 pixels become normalized float32 images."""
        if x.dtype != torch.uint8:
            return x
        mean, std = (torch.tensor(v, device=x.device)[:, None, None] for v in (self.mean, self.std))
        return x.float().div_(255).sub_(mean).div_(std)

    @property
    def black(self) -> Tensor:
        """A black pixel as a model sees it, (C,): the padding of crops."""
        if self.is_text or not self.mean:
            return torch.zeros(self.input_shape[0])
        return -torch.tensor(self.mean) / torch.tensor(self.std)


_SIGNED = ("the shape of an example", "the number of classes", "the class names", "the vocabulary")


def signature_difference(one: str, other: str) -> str:
    """The parts in which two `FederatedData.signature`s differ, in words; empty if in none."""
    parts, others = one.split(), other.split()
    if len(parts) != len(_SIGNED) or len(others) != len(_SIGNED):
        return "" if one == other else "the form of the signature"
    different = (a != b for a, b in zip(parts, others, strict=True))
    return " and ".join(itertools.compress(_SIGNED, different))
