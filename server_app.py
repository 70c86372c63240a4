# SPDX-License-Identifier: Apache-2.0
"""The ServerApp: one run of a strategy."""

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp
from flwr.superlink.grid.http_grid import HttpGrid

from fedfusion_flwr.app.server import run
from fedfusion_flwr.federation.careful_grid import CarefulGrid

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the federation that ``[tool.flwr.app.config]`` describes."""
    # Devices are not trusted; a simulation's clients are this machine's own.
    run(CarefulGrid(grid) if isinstance(grid, HttpGrid) else grid, context)
