# SPDX-License-Identifier: Apache-2.0
"""Show a partition without training: ``python -m fedfusion_flwr.data.partition 'key=value'``."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from fedfusion_flwr.config import ConfigError, RunConfig
from fedfusion_flwr.data.overview import PartitionOverview
from fedfusion_flwr.errors import FedFusionError
from fedfusion_flwr.overrides import parse_overrides

_FIGURES = (".svg", ".png")


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table and write what is asked for; 2 and one sentence if something is wrong."""
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
    figure, numbers = options.output, options.json
    try:
        config = RunConfig.from_run_config(parse_overrides(options.config))
        if figure is not None and figure.suffix.lower() not in _FIGURES:
            raise ConfigError(f"--output {figure} must end in {' or '.join(_FIGURES)}")
        overview = PartitionOverview.of(config)
        print(overview.table())
        if figure is not None:
            overview.draw(figure)
        if numbers is not None:
            numbers.write_text(json.dumps(overview.to_json(), indent=2) + "\n", encoding="utf-8")
    except (FedFusionError, OSError, ValueError) as problem:
        print(f"error: {problem}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
