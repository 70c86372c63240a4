# SPDX-License-Identifier: Apache-2.0
"""Our app and the floors that it is held against, on the workload of the benchmarks."""

from __future__ import annotations

import dataclasses
import functools
import multiprocessing
import tempfile
import time
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg

from benchmarks.local_training import bare_loop
from benchmarks.workload import Workload, in_simulation
from fedfusion_flwr import protocol
from fedfusion_flwr.app.local import configured_app
from fedfusion_flwr.app.server import run
from fedfusion_flwr.computation import place_model
from fedfusion_flwr.config import RunConfig
from fedfusion_flwr.data import data_for, local_data
from fedfusion_flwr.models import model_for

PATIENCE = 600.0
"""Seconds to wait for the other process of the bare loop."""

no_op = ClientApp()


@no_op.train()
def send_back(message: Message, context: Context) -> Message:
    """Reply with the received model."""
    metrics = MetricRecord({protocol.NUM_EXAMPLES: 1})
    arrays = message.content[protocol.ARRAYS]
    return Message(
        RecordDict({protocol.ARRAYS: arrays, protocol.METRICS: metrics}), reply_to=message
    )


def _app(strategy: str, clients: str, work: Workload, folder: Path) -> list[float]:
    """Our whole server, with its tests and files, and our clients or idle ones."""
    output = tempfile.mkdtemp(dir=folder)
    config = {**work.config(folder), "strategy": strategy, "output-dir": output}

    def main(grid: Grid, context: Context) -> None:
        run(grid, dataclasses.replace(context, run_config=config))

    return in_simulation(main, configured_app(config) if clients == "ours" else no_op, work)


fedfusion = functools.partial(_app, "fedfusion", "ours")
fedavg = functools.partial(_app, "fedavg", "ours")
idle_fedfusion = functools.partial(_app, "fedfusion", "idle")
idle_fedavg = functools.partial(_app, "fedavg", "idle")


def engine_floor(work: Workload, folder: Path) -> list[float]:
    """Flower's own FedAvg with idle clients: what the engine itself needs for a round."""
    config = RunConfig.from_run_config(work.config(folder))
    arrays = ArrayRecord(model_for(config, data_for(config)).state_dict())

    def main(grid: Grid, context: Context) -> None:
        strategy = FedAvg(fraction_evaluate=0.0, min_available_nodes=work.clients)
        strategy.start(grid, arrays, num_rounds=work.rounds)

    return in_simulation(main, no_op, work)


def bare_loops(work: Workload, folder: Path) -> list[float]:
    """As many processes of one thread as actors, which wait for each other before each round."""
    processes = multiprocessing.get_context("spawn")
    barrier, answers = processes.Barrier(work.actors), processes.Queue()
    team = [
        processes.Process(
            target=train_share, args=(rank, work, folder, barrier, answers), daemon=True
        )
        for rank in range(work.actors)
    ]
    for member in team:
        member.start()
    starts: list[float] = answers.get(timeout=PATIENCE)
    for member in team:
        member.join()
    return starts


def train_share(rank: int, work: Workload, folder: Path, barrier: Barrier, answers: Any) -> None:
    """Train every so-manyth client in every round; the first process tells when rounds began."""
    torch.set_num_threads(1)
    config = RunConfig.from_run_config(work.config(folder))
    shares = [local_data(config, client) for client in range(rank, work.clients, work.actors)]
    model = place_model(model_for(config, data_for(config)), torch.device("cpu"))
    received = {key: value.clone() for key, value in model.state_dict().items()}
    starts = []
    for _ in range(work.rounds):
        barrier.wait(PATIENCE)
        starts.append(time.perf_counter())
        for share in shares:
            model.load_state_dict(received)
            bare_loop(model, model, share.x, share.y, work.precision)
    if rank == 0:
        answers.put(starts)
