# SPDX-License-Identifier: Apache-2.0
"""Flower's FedAvg with an end of the round: served model, central evaluation, report, callbacks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg as FlowerFedAvg
from flwr.serverapp.strategy import Result

from fedfusion_flwr import protocol
from fedfusion_flwr.fusion import ServedAverage
from fedfusion_flwr.rounds import RoundCallback, RoundReport
from fedfusion_flwr.strategies.bookkeeping import Stopwatch

EvaluateFn = Callable[[int, ArrayRecord], MetricRecord | None]


class ReportingFedAvg(FlowerFedAvg):
    """Keeps the served model and hands every round's report to callbacks.

    Parameters
    ----------
    average_decay : float
        Decay of the moving average of global models that is served; 0 serves the newest.
    callbacks : Sequence[RoundCallback]
        See every round's report.
    **flower
        Arguments of `flwr.serverapp.strategy.FedAvg`.
    """

    def __init__(
        self, *, average_decay: float, callbacks: Sequence[RoundCallback], **flower: Any
    ) -> None:
        super().__init__(**flower)
        self.average = ServedAverage(average_decay)
        self.callbacks = list(callbacks)
        self.report = RoundReport(0)
        self._stopwatch = Stopwatch()
        self.num_rounds = 0
        self.timeout = 3600.0

    def check_outcome(self, num_rounds: int) -> None:
        """Raise if a run that came to its end was none."""

    def start(  # the wrapped evaluate_fn is Strategy.start's only hook at the end of a round
        self,
        grid: Grid,
        initial_arrays: ArrayRecord,
        num_rounds: int = 3,
        timeout: float = 3600,
        train_config: ConfigRecord | None = None,
        evaluate_config: ConfigRecord | None = None,
        evaluate_fn: EvaluateFn | None = None,
    ) -> Result:
        """Run the federation; see `flwr.serverapp.strategy.Strategy.start`.

        ``evaluate_fn`` sees the served model (the moving average, where there is one), and
        ``Result.arrays`` is the served model too.

        Raises
        ------
        FedFusionError
            What a strategy raises to end a run, e.g. `RunStopped` or `NotEnoughNodes`.
        """

        def end_round(server_round: int, arrays: ArrayRecord) -> MetricRecord | None:
            return self._end_round(server_round, arrays, evaluate_fn)

        self.num_rounds, self.timeout = num_rounds, timeout
        self._stopwatch.restart()
        result = super().start(
            grid, initial_arrays, num_rounds, timeout, train_config, evaluate_config, end_round
        )
        self.check_outcome(num_rounds)
        if self.average.state:
            result.arrays = protocol.record_from_state(self.average.state)
        return result

    def _end_round(
        self, server_round: int, arrays: ArrayRecord, evaluate_fn: EvaluateFn | None
    ) -> MetricRecord | None:
        served = self.average.state or protocol.state_from_record(arrays)
        self.report.model = served
        central = None
        if evaluate_fn is not None:
            record = protocol.record_from_state(served) if self.average.state else arrays
            central = evaluate_fn(server_round, record)
        for key, value in (central or {}).items():
            if isinstance(value, int | float):
                self.report.metrics[key] = float(value)
        self._stopwatch.lap(self.report, "evaluate")
        self.report_round()
        return central

    def report_round(self) -> None:
        """Hand the round's report to the callbacks."""
        for callback in self.callbacks:
            callback.on_round_end(self.report)
