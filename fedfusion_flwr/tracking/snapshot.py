# SPDX-License-Identifier: Apache-2.0
"""Objects as plain trees and back, for checkpoints: no pickle, no code in the file.

A class names what it is made of in ``STATE``, a tuple of attribute names; attributes that have a
``STATE`` themselves are captured in turn. What cannot be said so has ``capture`` and ``restore``
methods of its own. Values may be numbers, texts, None, tensors, NumPy arrays, lists, tuples,
dictionaries, and the dataclasses listed in `RECORDS`.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedfusion_flwr.errors import FedFusionError
from fedfusion_flwr.federation.replies import ClientReply
from fedfusion_flwr.federation.round import FusionSnapshot
from fedfusion_flwr.fusion import FusionPosterior, NormalizationStatistics
from fedfusion_flwr.fusion.memory import ClientMemory
from fedfusion_flwr.strategies.fedma.matching import Matching

RECORDS: dict[str, type] = {
    record.__name__: record
    for record in (
        ClientMemory,
        ClientReply,
        FusionPosterior,
        FusionSnapshot,
        Matching,
        NormalizationStatistics,
    )
}
"""Dataclasses whose instances may be part of a state."""

Tree = Any


class SnapshotError(FedFusionError, ValueError):
    """A tree that does not describe the object it is to be restored into."""


def capture(value: object) -> Tree:
    """A value as a tree of JSON values with tensors in it; tensors are shared, not copied."""
    if value is None or isinstance(value, bool | int | float | str | Tensor):
        return value
    if isinstance(value, np.ndarray):
        return {"array": torch.from_numpy(value)}
    if isinstance(value, list | tuple):
        return {type(value).__name__: [capture(item) for item in value]}
    if isinstance(value, dict):
        return {"dict": [[capture(key), capture(item)] for key, item in value.items()]}
    if type(value).__name__ in RECORDS and dataclasses.is_dataclass(value):
        fields = {f.name: capture(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return {"record": type(value).__name__, "fields": fields}
    if hasattr(value, "capture"):
        return {"state": capture(value.capture())}
    if hasattr(value, "STATE"):
        return {"state": {name: capture(getattr(value, name)) for name in value.STATE}}
    raise TypeError(f"{type(value).__name__} cannot be part of a state: give it STATE")


def rebuild(tree: Tree, present: object = None) -> Any:
    """Invert `capture`; objects with a ``STATE`` are restored in place, into ``present``.

    Raises
    ------
    SnapshotError
        If the tree does not fit the object that is present.
    """
    if not isinstance(tree, dict):
        return tree
    if "array" in tree:
        return tree["array"].numpy()
    if "list" in tree:
        return [rebuild(item) for item in tree["list"]]
    if "tuple" in tree:
        return tuple(rebuild(item) for item in tree["tuple"])
    if "dict" in tree:
        return {rebuild(key): rebuild(item) for key, item in tree["dict"]}
    if "record" in tree:
        record = RECORDS[tree["record"]]
        return record(**{name: rebuild(item) for name, item in tree["fields"].items()})
    return _restore(tree["state"], present)


def _restore(state: Tree, present: object) -> object:
    if hasattr(present, "restore"):
        present.restore(rebuild(state))
        return present
    names = set(getattr(present, "STATE", ()))
    if names != set(state):
        odd = sorted(names ^ set(state))
        raise SnapshotError(f"the state of {type(present).__name__} does not fit: {odd}")
    for name, item in state.items():
        setattr(present, name, rebuild(item, getattr(present, name)))
    return present
