# SPDX-License-Identifier: Apache-2.0
"""One run in a process of its own: ``python -m fedfusion_flwr.experiments.cell JOB``.

JOB is a JSON file; the row, or the reason why there is none, is written beside it. The process ends
when its standard input does, so that it never outlives the one that started it.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from fedfusion_flwr.app.client import handle_evaluate, handle_query, handle_train
from fedfusion_flwr.app.server import RunOutcome, run
from fedfusion_flwr.config import RunConfig
from fedfusion_flwr.errors import FedFusionError
from fedfusion_flwr.experiments.centralized import train_centralized
from fedfusion_flwr.experiments.rows import Row, identity, read_rows, write_text
from fedfusion_flwr.federation.in_process_grid import InProcessGrid

Handler = Callable[[Message, Context], Message]
SIMULATION, IN_PROCESS = "simulation", "in-process"
ENGINES = (SIMULATION, IN_PROCESS)
RESULT = "result.json"


def run_cell(config: dict[str, Any], engine: str, cpus: int, gpus: float) -> Row:
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
    """
    about = {**identity(), "engine": engine}
    started = time.perf_counter()
    outcome = _simulated(config, cpus, gpus) if engine == SIMULATION else _in_process(config)
    return {
        "metrics": read_rows(outcome.directory / "metrics.jsonl"),
        "summary": json.loads((outcome.directory / "summary.json").read_text(encoding="utf-8")),
        "digest": outcome.digest,
        "seconds": round(time.perf_counter() - started, 1),
        **about,
    }


def _in_process(config: dict[str, Any]) -> RunOutcome:
    grid = InProcessGrid(configured_app(config), RunConfig.from_run_config(config).num_clients)
    return run(grid, Context(1, 0, {}, RecordDict(), config))


def _simulated(config: dict[str, Any], cpus: int, gpus: float) -> RunOutcome:
    """Through Flower's simulation.

    Not by `flwr run`, which for every run also builds and installs the app's bundle and talks to a
    SuperLink, and needs the app's sources, which an installed package does not have. What it comes
    down to is called here. That function is deprecated, and this package is bound to a version of
    Flower that has it; it knows no run config, so that server and clients bring it along.
    """
    from flwr.simulation import run_simulation

    parsed = RunConfig.from_run_config(config)
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
    """The app's clients, which bring their run config along: no `flwr run` tells them of it."""

    def configured(handle: Handler) -> Handler:
        return lambda message, context: handle(
            message, dataclasses.replace(context, run_config=config)
        )

    app = ClientApp()
    app.train()(configured(handle_train))
    app.evaluate()(configured(handle_evaluate))
    app.query()(configured(handle_query))
    return app


def main(arguments: list[str]) -> int:
    """Do the job; 1 where it failed."""
    job = Path(arguments[0])
    threading.Thread(target=_end_with_parent, daemon=True).start()
    told = json.loads(job.read_text(encoding="utf-8"))
    kinds: dict[str, Callable[..., Row]] = {"cell": run_cell, "centralized": train_centralized}
    kind = kinds[told.pop("kind")]
    try:
        result: Row = {"row": kind(**told)}
    except FedFusionError as problem:
        result = {"error": str(problem)}
    except Exception as problem:  # noqa: BLE001 - whatever it is, the others go on
        traceback.print_exc()
        result = {"error": f"{type(problem).__name__}: {problem}"}
    write_text(job.with_name(RESULT), json.dumps(result))
    return int("error" in result)


def _end_with_parent() -> None:
    sys.stdin.read()
    os._exit(1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
