# SPDX-License-Identifier: Apache-2.0
"""Functions of the user's own, named in the run config as ``module:function``."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from fedfusion_flwr.errors import FedFusionError


class PluginError(FedFusionError, ValueError):
    """A function of the user's own that cannot be found or imported."""


def load_function(reference: str, key: str) -> Callable[..., Any]:
    """Import a function.

    Parameters
    ----------
    reference : str
        ``"package.module:function"``, as the run config's rule allows it.
    key : str
        The run-config key that holds it, for messages.

    Raises
    ------
    PluginError
        If there is no such module or function, or the module fails while it is imported.
    """
    module_name, _, function_name = reference.partition(":")
    try:
        module = importlib.import_module(module_name)
    except Exception as problem:
        missing = problem.name if isinstance(problem, ModuleNotFoundError) else None
        if missing is not None and f"{module_name}.".startswith(f"{missing}."):
            raise PluginError(
                f"`{key}` is {reference!r}, but Python finds no module {missing!r}: put "
                f"{missing.split('.')[0]}.py beside pyproject.toml, whose *.py files travel with "
                "the app, or install its package wherever the app runs."
            ) from problem
        raise PluginError(
            f"`{key}` is {reference!r}, but importing {module_name!r} fails with "
            f"{in_one_line(problem)}."
        ) from problem
    function = getattr(module, function_name, None)
    if not callable(function):
        where = getattr(module, "__file__", None) or module_name
        raise PluginError(
            f"`{key}` is {reference!r}, but {where} has no function {function_name!r}."
        )
    return function  # type: ignore[no-any-return]


def in_one_line(problem: BaseException) -> str:
    """The exception's type and the first line of its message."""
    lines = str(problem).strip().splitlines()
    return ": ".join([type(problem).__name__, *lines[:1]])
