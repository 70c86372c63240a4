# SPDX-License-Identifier: Apache-2.0
"""Run-config overrides on a command line, as ``flwr run --run-config`` takes them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import cast

from click import ClickException
from flwr.common.config import parse_config_args

from fedfusion_flwr.config import ConfigError, Value

_PAIR = re.compile(r"\S+?=('[^']*'|\"[^\"]*\"|\S+)")


def parse_overrides(arguments: Sequence[str]) -> dict[str, Value]:
    """``key=value`` pairs, several in an argument, or the path of a TOML file.

    Raises
    ------
    ConfigError
        If something is neither.
    """
    for argument in arguments:
        # Flower's parser leaves out what is no pair, and says nothing.
        rest = _PAIR.sub("", argument).strip()
        if rest and not argument.endswith(".toml"):
            raise ConfigError(f"'{rest}' is no run-config override; write key=value")
    try:
        return cast(dict[str, Value], parse_config_args(list(arguments)))
    except ClickException as problem:
        raise ConfigError(problem.message) from problem
