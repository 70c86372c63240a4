# SPDX-License-Identifier: Apache-2.0
"""One federated run of a suite, and its row."""

from __future__ import annotations

import dataclasses
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from safetensors.torch import load_file

from fedfusion_flwr.app.client import handle_evaluate, handle_query, handle_train
from fedfusion_flwr.app.server import RunOutcome, run
from fedfusion_flwr.config import RunConfig
from fedfusion_flwr.experiments.results import compact
from fedfusion_flwr.experiments.rows import Row, identity, read_rows
from fedfusion_flwr.federation.in_process_grid import InProcessGrid

Handler = Callable[[Message, Context], Message]
SIMULATION, IN_PROCESS = "simulation", "in-process"
ENGINES = (SIMULATION, IN_PROCESS)


def run_cell(
    config: dict[str, Any],
    engine: str,
    cpus: int,
    gpus: float,
    references: Sequence[Mapping[str, Any]] = (),
    drawn: str | None = None,
) -> Row:
    """Run one federation; what its row has beside the cell's factors.

    Parameters
    ----------
    config : dict[str, Value]
        Run-config overrides, ``output-dir`` among them.
    engine : {"simulation", "in-process"}
        Flower's simulation, Ray and all, or all clients in turn in this process. The numbers are
        the same.
    cpus : int
        simulation: CPUs that Ray may use.
    gpus : float
        simulation: share of a GPU for each client.
    references : sequence of Mapping
        Models trained on the pooled data to compare with, see `bias.measure_bias`; without any,
        feature bias is not measured.
    drawn : str or None
        File for what is drawn of the run's inference; None keeps nothing, nor the running values
        that are drawn of its model.
    """
    about = {**identity(), "engine": engine}
    started = time.perf_counter()
    outcome = run_federation(config, engine, cpus, gpus)
    row: Row = {
        "metrics": compact(read_rows(outcome.directory / "metrics.jsonl")),
        "digest": outcome.digest,
        "seconds": round(time.perf_counter() - started, 1),
        **about,
    }
    # Here, not above: what is measured at the end takes long to import.
    if references:
        from fedfusion_flwr.experiments.bias import measure_bias

        state = load_file(outcome.directory / "final_model.safetensors")
        row["bias"] = measure_bias(config, state, references, drawn is not None)
    if drawn is not None:
        from fedfusion_flwr.experiments.inferred import keep_inferred

        try:
            keep_inferred(outcome.directory, Path(drawn), outcome.digest)
        except Exception:  # noqa: BLE001 - a run of hours is not lost for a picture
            traceback.print_exc()
    return row


def run_federation(
    config: dict[str, Any], engine: str = IN_PROCESS, cpus: int = 1, gpus: float = 0.0
) -> RunOutcome:
    """Run one federation as `run_cell` does; nothing but the run.

    Flower's simulation is called without `flwr run`, which for every run also builds and installs
    the app's bundle and talks to a SuperLink, and needs the app's sources, which an installed
    package does not have. What it comes down to is called here. That function is deprecated, and
    this package is bound to a version of Flower that has it; it knows no run config, so server and
    clients bring it along.
    """
    parsed = RunConfig.from_run_config(config)
    if engine == IN_PROCESS:
        grid = InProcessGrid(configured_app(config), parsed.num_clients)
        return run(grid, Context(1, 0, {}, RecordDict(), config))
    from flwr.simulation import run_simulation

    server_app, outcomes = ServerApp(), []

    @server_app.main()
    def main(grid: Grid, context: Context) -> None:
        outcomes.append(run(grid, dataclasses.replace(context, run_config=config)))

    run_simulation(
        server_app,
        configured_app(config),
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
