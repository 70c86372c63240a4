# SPDX-License-Identifier: Apache-2.0
"""Make a report: ``python -m fedfusion_flwr.report PATH``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from fedfusion_flwr.errors import FedFusionError
from fedfusion_flwr.report import write_report


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the report and print where its page is; 2 and one sentence where something is wrong."""
    parser = argparse.ArgumentParser(
        prog="python -m fedfusion_flwr.report",
        description="Draw figures and one page from the records of a run or of a suite.",
    )
    parser.add_argument("path", type=Path, help="run directory, or a suite's folder of results")
    parser.add_argument("--output", type=Path, help="folder of the report; default: PATH/report")
    options = parser.parse_args(arguments)
    try:
        print(write_report(options.path, options.output))
    except (FedFusionError, OSError) as problem:
        print(f"error: {problem}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
