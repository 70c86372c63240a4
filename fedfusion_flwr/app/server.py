# SPDX-License-Identifier: Apache-2.0
"""A run from the server's side: config -> data, model, strategy -> rounds -> artifacts."""

from __future__ import annotations

import os
from dataclasses import dataclass
from logging import INFO
from pathlib import Path

from flwr.app import ArrayRecord, ConfigRecord, Context, MetricRecord
from flwr.common.logger import log
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result

from fedfusion_flwr import protocol
from fedfusion_flwr.app.training import evaluate
from fedfusion_flwr.computation import choose_device, place_model
from fedfusion_flwr.config import ConfigError, RunConfig
from fedfusion_flwr.data import (
    FederatedData,
    Partition,
    central_test_data,
    data_for,
    partition_for,
)
from fedfusion_flwr.data.roots import CLASSES_FILE, MOMENTS_FILE, moments_lines
from fedfusion_flwr.data.text import VOCABULARY_FILE
from fedfusion_flwr.federation.careful_grid import CarefulGrid
from fedfusion_flwr.federation.in_process_grid import InProcessGrid
from fedfusion_flwr.federation.round import RoundCallback, State
from fedfusion_flwr.federation.strategy import EvaluateFn, FederatedStrategy
from fedfusion_flwr.models import model_for, shape_of
from fedfusion_flwr.models.resize import fit_to_state
from fedfusion_flwr.strategies import build_strategy, check_fits, strategy_class
from fedfusion_flwr.strategies.fedma.layers import PlainNetwork
from fedfusion_flwr.tracking import (
    BestModel,
    Checkpointer,
    ComponentRecovery,
    ConsoleLine,
    EarlyStopping,
    FusionArchive,
    IdleCores,
    RunDirectory,
    RunLog,
    RunSummary,
    TensorBoardLog,
    ended_by_signals,
    newest_checkpoint,
    run_path,
    state_digest,
)
from fedfusion_flwr.tracking.checkpoint import Checkpoint


@dataclass(frozen=True)
class RunOutcome:
    """A finished run: Flower's result, digest of the served model, run directory, strategy."""

    result: Result
    digest: str
    directory: Path
    strategy: FederatedStrategy


def run(grid: Grid, context: Context) -> RunOutcome:
    """Run one federation as ``context.run_config`` says.

    Raises
    ------
    FedFusionError
        One sentence: what is wrong in config, data or federation, and what to do. Files that were
        already written stay.
    """
    config = RunConfig.from_run_config(context.run_config)
    # Each of these refuses what cannot run, before any client trains.
    strategy_class(config.strategy)
    data = data_for(config)
    cut = partition_for(config)
    model = model_for(config, data)
    check_fits(config, model, shape_of(data).examples(2))

    def initial_state(number: int) -> State:
        return model_for(config, data, number).state_dict()

    def network() -> PlainNetwork:
        # Imported here: only one strategy needs it.
        from fedfusion_flwr.strategies.fedma.network import plain_network

        return plain_network(model, config.model, data.input_shape)

    strategy = build_strategy(config, (), initial_state, network)
    checkpoint = None
    if config.resume_from:
        directory = RunDirectory.to_go_on_with(run_path(config.resume_from))
        checkpoint = newest_checkpoint(directory.path, config)
    else:
        directory = RunDirectory.for_config(config)
    directory.write_json("config.json", config.to_run_config())
    _write_for_devices(directory, data)
    records = _Records(directory, config, strategy, cut)
    strategy.callbacks = records.callbacks
    if checkpoint is not None:
        records.go_on_from(checkpoint)
    _check_federation(grid, strategy, config)
    on_this_machine = not isinstance(grid, CarefulGrid | InProcessGrid)
    if on_this_machine and choose_device(config.device).type == "cpu":
        strategy.callbacks.append(IdleCores(os.cpu_count() or 1, config.threads_per_client))
    log(INFO, "Run directory: %s", directory.path)
    sent = ConfigRecord(
        {
            protocol.DATA_SIGNATURE: data.signature,
            protocol.LABEL_CALIBRATION: label_calibration(config),
        }
    )
    try:
        with ended_by_signals(records.checkpointer):
            result = strategy.start(
                grid,
                initial_arrays=protocol.record_from_state(model.state_dict()),
                num_rounds=config.num_server_rounds,
                timeout=config.round_timeout,
                train_config=sent,
                evaluate_config=sent,
                evaluate_fn=central_evaluation(config),
            )
    finally:
        # Also if the run was stopped: the last good model is worth keeping.
        if strategy.progress.average.state:
            _save_final(directory, strategy)
            records.archive.write()
            directory.write_json("summary.json", records.history.summary())
    digest = state_digest(protocol.state_from_record(result.arrays))
    log(INFO, "%s", records.history)
    log(INFO, "Final model digest: %s", digest)
    log(INFO, "Run directory: %s", directory.path)
    return RunOutcome(result, digest, directory.path, strategy)


class _Records:
    """The round callbacks of a run, in the order in which they are called."""

    def __init__(
        self,
        directory: RunDirectory,
        config: RunConfig,
        strategy: FederatedStrategy,
        cut: Partition,
    ) -> None:
        self.archive = FusionArchive(directory)
        self.written: list[RunLog | FusionArchive | TensorBoardLog] = [
            RunLog(directory),
            self.archive,
        ]
        if config.tensorboard:
            self.written.append(TensorBoardLog(directory.path / "tensorboard"))
        self.best, self.history = BestModel(directory, config.best_metric), RunSummary()
        parts: dict[str, object] = {"best": self.best, "history": self.history}
        self.callbacks: list[RoundCallback] = []
        if cut.mixtures is not None:
            recovery = ComponentRecovery(cut.mixtures)
            parts["recovery"] = recovery
            self.callbacks.append(recovery)
        self.checkpointer = Checkpointer(directory, config, strategy, parts, self.archive.write)
        self.callbacks += [
            *self.written,
            self.best,
            self.history,
            ConsoleLine(config.num_server_rounds),
            self.checkpointer,
        ]
        if config.patience:
            self.callbacks.append(EarlyStopping(self.best, config.patience))

    def go_on_from(self, checkpoint: Checkpoint) -> None:
        """Restore everything from the checkpoint; later rounds are forgotten."""
        self.checkpointer.restore(checkpoint)
        for part in self.written:
            part.rewind(checkpoint.server_round)


def label_calibration(config: RunConfig) -> float:
    """The clients' tau: the config's, or the strategy's own where it says -1."""
    if config.label_calibration >= 0:
        return config.label_calibration
    return strategy_class(config.strategy).own_label_calibration


def central_evaluation(config: RunConfig) -> EvaluateFn:
    """A function that evaluates a model on the server's test set."""
    device = choose_device(config.device, config.precision)
    x, y = (tensor.to(device) for tensor in central_test_data(config))
    model = model_for(config, data_for(config))
    model = place_model(model, device)

    def evaluate_global(server_round: int, arrays: ArrayRecord) -> MetricRecord:
        state = protocol.state_from_record(arrays)
        fitted = fit_to_state(model, state)
        fitted.load_state_dict(state)
        loss, accuracy = evaluate(fitted, x, y, config.precision)
        return MetricRecord({"global-accuracy": accuracy, "global-loss": loss})

    return evaluate_global


def _check_federation(grid: Grid, strategy: FederatedStrategy, config: RunConfig) -> None:
    connected = strategy.progress.roster.wait_for(
        grid, config.num_clients, config.node_timeout, at_least=config.num_first_clients
    )
    if len(connected) > config.num_clients:
        raise ConfigError(
            f"num-clients = {config.num_clients}, but {len(connected)} clients are connected; "
            "make num-clients and the federation's num-supernodes equal"
        )


def _write_for_devices(directory: RunDirectory, data: FederatedData) -> None:
    """Write the files that a device with its own data needs in its data-root; see docs/data.md."""
    if data.classes:
        directory.write_lines(CLASSES_FILE, data.classes)
    if data.mean:
        directory.write_lines(MOMENTS_FILE, moments_lines(data.mean, data.std))
    if data.vocabulary:
        directory.write_lines(VOCABULARY_FILE, data.vocabulary)


def _save_final(directory: RunDirectory, strategy: FederatedStrategy) -> None:
    state = strategy.progress.average.state
    directory.write_state(
        "final_model.safetensors",
        state,
        round=strategy.server_round,
        digest=state_digest(state),
    )
    models = strategy.models()
    if models:
        directory.write_state(
            "final_models.safetensors", protocol.pack_states(models), round=strategy.server_round
        )
