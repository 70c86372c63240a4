# SPDX-License-Identifier: Apache-2.0
"""A whole federation on this machine without `flwr run`: for comparisons, benchmarks and tests."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, cast

from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from fedfusion_flwr.app.client import handle_evaluate, handle_query, handle_train
from fedfusion_flwr.app.server import RunOutcome, run
from fedfusion_flwr.config import RunConfig
from fedfusion_flwr.federation.in_process_grid import InProcessGrid

Handler = Callable[[Message, Context], Message]
SIMULATION, IN_PROCESS = "simulation", "in-process"
ENGINES = (SIMULATION, IN_PROCESS)


def run_locally(
    config: dict[str, Any],
    clients: Handler | None = None,
    *,
    engine: str = IN_PROCESS,
    cpus: int = 1,
    gpus: float = 0.0,
) -> RunOutcome:
    """Run one federation on this machine.

    Parameters
    ----------
    config : dict[str, Value]
        Run-config overrides.
    clients : Callable or None
        Answers every message in place of the app's clients.
    engine : {"in-process", "simulation"}
        All clients in turn in this process, or Flower's simulation, Ray and all. The numbers are
        the same.
    cpus : int
        simulation: CPUs that Ray may use.
    gpus : float
        simulation: share of a GPU for each client.

    Flower's simulation is called without `flwr run`, which for every run also builds and installs
    the app's bundle and talks to a SuperLink, and needs the app's sources, which an installed
    package does not have. What it comes down to is called here. That function is deprecated, and
    this package is bound to a version of Flower that has it; it knows no run config, so server and
    clients bring it along.
    """
    parsed, answer = RunConfig.from_run_config(config), clients or configured_app(config)
    if engine == IN_PROCESS:
        grid = InProcessGrid(answer, parsed.num_clients, config)
        return run(grid, Context(1, 0, {}, RecordDict(), config))
    from flwr.simulation import run_simulation

    server_app, outcomes = ServerApp(), []

    @server_app.main()
    def main(grid: Grid, context: Context) -> None:
        outcomes.append(run(grid, dataclasses.replace(context, run_config=config)))

    run_simulation(
        server_app,
        cast(ClientApp, answer),
        parsed.num_clients,
        backend_config={
            "client_resources": {"num_cpus": parsed.threads_per_client, "num_gpus": gpus},
            "init_args": {"num_cpus": max(cpus, parsed.threads_per_client)},
        },
    )
    return outcomes[0]


def configured_app(config: dict[str, Any]) -> ClientApp:
    """The app's clients, which bring their run config along: no `flwr run` gives it to them."""

    def configured(handle: Handler) -> Handler:
        return lambda message, context: handle(
            message, dataclasses.replace(context, run_config=config)
        )

    app = ClientApp()
    app.train()(configured(handle_train))
    app.evaluate()(configured(handle_evaluate))
    app.query()(configured(handle_query))
    return app
