# SPDX-License-Identifier: Apache-2.0
"""The user's own functions, which run-config keys name as ``module:function``."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from typing import Any

from fedfusion_flwr.errors import FedFusionError


def load_function(key: str, name: str, error: type[FedFusionError]) -> Callable[..., Any]:
    """Import the function that ``key`` names.

    Parameters
    ----------
    key : str
        The run-config key, for messages.
    name : str
        ``package.module:function``.
    error : type[FedFusionError]
        Raised if there is no such function, or its module cannot be imported.
    """
    module_name, _, function_name = name.partition(":")
    try:
        module = importlib.import_module(module_name)
    except Exception as problem:
        missing = problem.name if isinstance(problem, ModuleNotFoundError) else None
        if missing is None or not f"{module_name}.".startswith(f"{missing}."):
            raise error(
                f"`{key}` is {name!r}, but importing {module_name} failed: {described(problem)}."
            ) from problem
        raise error(
            f"`{key}` is {name!r}, but there is no module {missing!r}: put {missing}.py beside "
            "client_app.py, where every *.py goes into the app's bundle, or install it (Python "
            f"looked in {', '.join(path or 'its working directory' for path in sys.path)})."
        ) from problem
    function = getattr(module, function_name, None)
    if not callable(function):
        found = "has no" if function is None else "has no callable"
        raise error(f"`{key}` is {name!r}, but {module.__file__} {found} {function_name!r}.")
    return function  # type: ignore[no-any-return]


def described(problem: Exception) -> str:
    """An exception's type and the first line of its text."""
    lines = str(problem).strip().splitlines()
    return f"{type(problem).__name__}: {lines[0]}" if lines else type(problem).__name__
