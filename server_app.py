# SPDX-License-Identifier: Apache-2.0
"""The ServerApp: one run of a strategy."""

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedfusion_flwr.server import run

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the federation that ``[tool.flwr.app.config]`` describes."""
    run(grid, context)
