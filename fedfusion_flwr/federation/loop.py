# SPDX-License-Identifier: Apache-2.0
"""The loop over the rounds: served model, central evaluation, report, callbacks, resumption."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from logging import INFO
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, MetricRecord
from flwr.common.logger import log
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg as FlowerFedAvg
from flwr.serverapp.strategy import Result
from flwr.serverapp.strategy.strategy_utils import log_strategy_start_info

from fedfusion_flwr import protocol
from fedfusion_flwr.federation.bookkeeping import Stopwatch
from fedfusion_flwr.federation.round import RoundCallback, RoundReport, State, StopRun
from fedfusion_flwr.fusion import ServedAverage

EvaluateFn = Callable[[int, ArrayRecord], MetricRecord | None]


class ReportingFedAvg(FlowerFedAvg):
    """Keeps the served model and hands every round's report to callbacks.

    Parameters
    ----------
    average_decay : float
        Decay of the moving average of global models that is served; 0 serves the newest.
    central_evaluate_every : int
        The server evaluates in every so many rounds, and in the first and the last.
    callbacks : Sequence[RoundCallback]
        See every round's report; one that raises `StopRun` ends the run after that round.
    **flower
        Arguments of `flwr.serverapp.strategy.FedAvg`.
    """

    STATE: tuple[str, ...] = ("rounds_done", "newest", "average")
    """What a checkpoint holds of the strategy; an algorithm adds the attributes of its own."""

    def __init__(
        self,
        *,
        average_decay: float,
        callbacks: Sequence[RoundCallback],
        central_evaluate_every: int = 1,
        **flower: Any,
    ) -> None:
        super().__init__(**flower)
        self.central_evaluate_every = central_evaluate_every
        self.average = ServedAverage(average_decay)
        self.callbacks = list(callbacks)
        self.report = RoundReport(0)
        self.rounds_done = 0
        self.newest: State = {}
        self.num_rounds = 0
        self.timeout = 3600.0
        self._stopwatch = Stopwatch()

    def check_outcome(self, num_rounds: int) -> None:
        """Raise if a run that came to its end was none."""

    def start(
        self,
        grid: Grid,
        initial_arrays: ArrayRecord,
        num_rounds: int = 3,
        timeout: float = 3600,
        train_config: ConfigRecord | None = None,
        evaluate_config: ConfigRecord | None = None,
        evaluate_fn: EvaluateFn | None = None,
    ) -> Result:
        """Run the federation; as `flwr.serverapp.strategy.Strategy.start`, and beyond:

        ``evaluate_fn`` sees the served model (the moving average, where there is one), and
        ``Result.arrays`` is the served model too. A strategy restored from a checkpoint goes on
        after its last finished round, up to ``num_rounds`` in all.

        Raises
        ------
        FedFusionError
            What a strategy raises to end a run, e.g. `RunStopped` or `NotEnoughNodes`.
        """
        train_config = train_config or ConfigRecord()
        evaluate_config = evaluate_config or ConfigRecord()
        self.num_rounds, self.timeout = num_rounds, timeout
        log(INFO, "Starting %s strategy:", type(self).__name__)
        log_strategy_start_info(num_rounds, initial_arrays, train_config, evaluate_config)
        self.summary()
        result = Result()
        arrays = initial_arrays
        if self.rounds_done:
            arrays = protocol.record_from_state(self.newest)
            log(INFO, "Going on after round %d", self.rounds_done)
        self._stopwatch.restart()
        try:
            if not self.rounds_done:
                self._end_round(0, arrays, result, evaluate_fn)
            for server_round in range(self.rounds_done + 1, num_rounds + 1):
                arrays = self._train(server_round, arrays, result, grid, train_config)
                self._evaluate(server_round, arrays, result, grid, evaluate_config)
                self._end_round(server_round, arrays, result, evaluate_fn)
        except StopRun as reason:
            log(INFO, "Ended after round %d: %s", self.rounds_done, reason)
        self.check_outcome(num_rounds)
        result.arrays = arrays
        if self.average.state:
            result.arrays = protocol.record_from_state(self.average.state)
        return result

    def _train(
        self,
        server_round: int,
        arrays: ArrayRecord,
        result: Result,
        grid: Grid,
        config: ConfigRecord,
    ) -> ArrayRecord:
        messages = self.configure_train(server_round, arrays, config, grid)
        replies = grid.send_and_receive(messages, timeout=self.timeout)
        new_arrays, metrics = self.aggregate_train(server_round, replies)
        if metrics is not None:
            result.train_metrics_clientapp[server_round] = metrics
        return arrays if new_arrays is None else new_arrays

    def _evaluate(
        self,
        server_round: int,
        arrays: ArrayRecord,
        result: Result,
        grid: Grid,
        config: ConfigRecord,
    ) -> None:
        messages = self.configure_evaluate(server_round, arrays, config, grid)
        replies = grid.send_and_receive(messages, timeout=self.timeout)
        metrics = self.aggregate_evaluate(server_round, replies)
        if metrics is not None:
            result.evaluate_metrics_clientapp[server_round] = metrics

    def _end_round(
        self,
        server_round: int,
        arrays: ArrayRecord,
        result: Result,
        evaluate_fn: EvaluateFn | None,
    ) -> None:
        self.rounds_done, self.newest = server_round, protocol.state_from_record(arrays)
        self.report.model = self.average.state or self.newest
        due = server_round % self.central_evaluate_every == 0 or server_round == self.num_rounds
        if evaluate_fn is not None and due:
            served = protocol.record_from_state(self.report.model) if self.average.state else arrays
            central = evaluate_fn(server_round, served)
            if central is not None:
                result.evaluate_metrics_serverapp[server_round] = central
            for key, value in (central or {}).items():
                if isinstance(value, int | float):
                    self.report.metrics[key] = float(value)
        self._stopwatch.lap(self.report, "evaluate")
        self.report_round()

    def report_round(self) -> None:
        """Hand the round's report to the callbacks."""
        for callback in self.callbacks:
            callback.on_round_end(self.report)
