# SPDX-License-Identifier: Apache-2.0
"""Show a partition without training: ``python -m fedfusion_flwr.data.partition 'key=value'``."""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from click import ClickException
from flwr.common.config import parse_config_args

from fedfusion_flwr.config import ConfigError, RunConfig
from fedfusion_flwr.data.partition.overview import PartitionOverview
from fedfusion_flwr.errors import FedFusionError

_PAIR = re.compile(r"\S+?=('[^']*'|\"[^\"]*\"|\S+)")
_FIGURES = (".svg", ".png")


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table, write what is asked for; 2 and one sentence where something is wrong."""
    parser = argparse.ArgumentParser(
        prog="python -m fedfusion_flwr.data.partition",
        description="Show how classes and sizes spread over the clients, without training.",
    )
    parser.add_argument(
        "config",
        nargs="*",
        help="run-config keys, as for flwr run --run-config: 'partition=\"dirichlet\" seed=1'",
    )
    parser.add_argument("--output", type=Path, help="figure to write, .svg or .png")
    parser.add_argument("--json", type=Path, help="file to write the numbers to")
    options = parser.parse_args(arguments)
    try:
        _show(_parsed(options.config), options.output, options.json)
    except ClickException as problem:
        return _refuse(problem.message)
    except (FedFusionError, OSError, ValueError) as problem:
        return _refuse(str(problem))
    return 0


def _show(config: RunConfig, figure: Path | None, numbers: Path | None) -> None:
    if figure is not None and figure.suffix.lower() not in _FIGURES:
        raise ConfigError(f"--output {figure} must end in {' or '.join(_FIGURES)}")
    overview = PartitionOverview.of(config)
    print(overview.table())
    if figure is not None:
        overview.draw(figure)
    if numbers is not None:
        numbers.write_text(json.dumps(overview.to_json(), indent=2) + "\n", encoding="utf-8")


def _parsed(arguments: list[str]) -> RunConfig:
    for argument in arguments:
        # Flower's parser leaves out what is no pair, and says nothing.
        rest = _PAIR.sub("", argument).strip()
        if rest and not argument.endswith(".toml"):
            raise ConfigError(f"'{rest}' is no run-config override; write key=value")
    return RunConfig.from_run_config(parse_config_args(arguments))


def _refuse(sentence: str) -> int:
    print(f"error: {sentence}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
