# SPDX-License-Identifier: Apache-2.0
"""States as plain trees and back, for checkpoints: no pickle, no code in the file.

A state is a dataclass. Its fields may be numbers, texts, None, tensors, NumPy arrays, lists,
tuples, dictionaries, further dataclasses, and objects with ``capture`` and ``restore`` methods.
The types that a tree is rebuilt into come from the state's annotations, never from the file.
"""

from __future__ import annotations

import dataclasses
import types
from typing import Any, Union, get_args, get_origin, get_type_hints

import numpy as np
import torch
from torch import Tensor

from fedfusion_flwr.errors import FedFusionError

Tree = Any


class SnapshotError(FedFusionError, ValueError):
    """A tree that does not match the state it is to be restored into."""


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
    if hasattr(value, "capture"):
        return {"captured": capture(value.capture())}
    if dataclasses.is_dataclass(value):
        return {
            "fields": {f.name: capture(getattr(value, f.name)) for f in dataclasses.fields(value)}
        }
    raise TypeError(f"{type(value).__name__} cannot be part of a state: make it a dataclass")


def rebuild(tree: Tree, present: Any = None) -> Any:
    """Invert `capture` for a state of the type of ``present``, whose objects are restored in place.

    Raises
    ------
    SnapshotError
        If the tree does not fit that type.
    """
    return _rebuild(tree, type(present), present)


def _rebuild(tree: Tree, kind: Any, present: object = None) -> Any:
    if not isinstance(tree, dict):
        return tree
    if "array" in tree:
        return tree["array"].numpy()
    kind = _without_none(kind)
    inner = get_args(kind) or (Any, Any)
    if "list" in tree:
        return [_rebuild(item, inner[0]) for item in tree["list"]]
    if "tuple" in tree:
        return tuple(_rebuild(item, inner[0]) for item in tree["tuple"])
    if "dict" in tree:
        return {_rebuild(key, inner[0]): _rebuild(item, inner[-1]) for key, item in tree["dict"]}
    if "captured" in tree and hasattr(present, "restore"):
        present.restore(_rebuild(tree["captured"], Any))
        return present
    if "fields" in tree and dataclasses.is_dataclass(kind):
        return _rebuild_fields(tree["fields"], kind, present)
    raise SnapshotError(f"the state holds {sorted(tree)} where {kind} is expected")


def _rebuild_fields(values: dict[str, Tree], kind: Any, present: object) -> Any:
    names = {f.name for f in dataclasses.fields(kind)}
    if names != set(values):
        odd = sorted(names ^ set(values))
        raise SnapshotError(f"the state of {kind.__name__} does not fit: {odd}")
    hints = get_type_hints(kind)
    rebuilt = {
        name: _rebuild(item, hints[name], getattr(present, name, None))
        for name, item in values.items()
    }
    return kind(**rebuilt)


def _without_none(kind: Any) -> Any:
    """The type behind ``X | None``."""
    if get_origin(kind) in (Union, types.UnionType):
        return next(part for part in get_args(kind) if part is not types.NoneType)
    return kind
