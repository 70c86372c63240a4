# SPDX-License-Identifier: Apache-2.0
"""States as plain trees and back, for checkpoints: no pickle, no code in the file.

A state is a dataclass. Its fields may be numbers, texts, None, tensors, NumPy arrays, lists,
tuples, dictionaries, further dataclasses, and objects with ``capture`` and ``restore`` methods.
The types that a tree is rebuilt into come from the state's annotations, never from the file.
"""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Mapping
from typing import Any, Union, get_args, get_origin, get_type_hints

import numpy as np
import torch
from torch import Tensor

from fedfusion_flwr.errors import FedFusionError

Tree = Any


class SnapshotError(FedFusionError, ValueError):
    """A tree that does not match the state it is to be restored into."""


def capture(states: Mapping[str, object]) -> tuple[dict[str, Tree], dict[str, Tensor]]:
    """States by name as JSON values, and their tensors by the names that stand there instead.

    Tensors are shared, not copied; one that occurs twice has one name.
    """
    named: dict[int, tuple[str, Tensor]] = {}

    def tree(value: object) -> Tree:
        if value is None or isinstance(value, bool | int | float | str):
            return value
        if isinstance(value, Tensor):
            return {"tensor": named.setdefault(id(value), (f"t{len(named)}", value))[0]}
        if isinstance(value, np.ndarray):
            return {"array": tree(torch.from_numpy(value))}
        if isinstance(value, list | tuple):
            return {type(value).__name__: [tree(item) for item in value]}
        if isinstance(value, dict):
            return {"dict": [[tree(key), tree(item)] for key, item in value.items()]}
        if hasattr(value, "capture"):
            return {"captured": tree(value.capture())}
        if dataclasses.is_dataclass(value):
            fields = dataclasses.fields(value)
            return {"fields": {f.name: tree(getattr(value, f.name)) for f in fields}}
        raise TypeError(f"{type(value).__name__} cannot be part of a state: make it a dataclass")

    trees = {name: tree(state) for name, state in states.items()}
    return trees, dict(named.values())


def rebuild(tree: Tree, tensors: Mapping[str, Tensor], present: Any = None) -> Any:
    """Invert `capture` for one state, of the type of ``present``, whose objects are restored.

    Raises
    ------
    SnapshotError
        If the tree does not fit that type.
    """

    def value(tree: Tree, kind: Any, present: object = None) -> Any:
        kind = _without_none(kind)
        inner = get_args(kind) or (Any, Any)
        match tree:
            case {"tensor": name}:
                return tensors[name]
            case {"array": {"tensor": name}}:
                return tensors[name].numpy()
            case {"list": items}:
                return [value(item, inner[0]) for item in items]
            case {"tuple": items}:
                return tuple(value(item, inner[0]) for item in items)
            case {"dict": pairs}:
                return {value(key, inner[0]): value(item, inner[-1]) for key, item in pairs}
            case {"captured": item} if hasattr(present, "restore"):
                present.restore(value(item, Any))
                return present
            case {"fields": items} if dataclasses.is_dataclass(kind):
                return fields(items, kind, present)
            case dict():
                raise SnapshotError(f"the state holds {sorted(tree)} where {kind} is expected")
        return tree

    def fields(items: dict[str, Tree], kind: Any, present: object) -> Any:
        if odd := {f.name for f in dataclasses.fields(kind)} ^ items.keys():
            raise SnapshotError(f"the state of {kind.__name__} does not fit: {sorted(odd)}")
        hints = get_type_hints(kind)
        old = {name: getattr(present, name, None) for name in items}
        return kind(**{name: value(item, hints[name], old[name]) for name, item in items.items()})

    return value(tree, type(present), present)


def _without_none(kind: Any) -> Any:
    """The type behind ``X | None``."""
    if get_origin(kind) in (Union, types.UnionType):
        return next(part for part in get_args(kind) if part is not types.NoneType)
    return kind
