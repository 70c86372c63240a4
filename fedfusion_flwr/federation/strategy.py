# SPDX-License-Identifier: Apache-2.0
"""The engine: a Flower strategy that does everything in a federation except the algorithm."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from logging import INFO

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.common.logger import log
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy
from flwr.serverapp.strategy.strategy_utils import log_strategy_start_info

from fedfusion_flwr import protocol
from fedfusion_flwr.federation.conversation import WHERE, Conversation, RunStopped
from fedfusion_flwr.federation.round import RoundInProgress, RoundReport, StopRun

EvaluateFn = Callable[[int, ArrayRecord], MetricRecord | None]

MODELS_IN_FLIGHT = 16
"""Most distinct models sent out for evaluation at a time; each is held in memory."""


@dataclass(kw_only=True, eq=False, repr=False)
class FederatedStrategy(Conversation, Strategy):
    """Seeded sampling, checked replies, evaluation, reports and resumption; without an algorithm.

    Parameters
    ----------
    fraction_train, fraction_evaluate, min_train_nodes, min_evaluate_nodes, min_available_nodes,
    node_timeout, evaluate_every, central_evaluate_every
        See `Participation`.
    min_valid_replies, max_failed_rounds, max_examples, max_update_ratio
        See `Plausibility`.
    server_learning_rate, server_momentum, max_client_weight
        See `ServerUpdate`; strategies with several models refuse them.
    average_decay, pool_moments
        See `Serving`.
    seed : int
        Seeds sampling and everything else that the server draws.
    statistics_layers : {"all", "ends"}
        Which normalization layers' statistics the clients report.
    weighted_by_key, arrayrecord_key, configrecord_key : str
        Names of the example count and of the records, as in Flower's FedAvg.
    train_metrics_aggr_fn, evaluate_metrics_aggr_fn : Callable or None
        Average the clients' metrics, as in Flower's FedAvg; weighted by examples by default.
    defence : Defence or None
        Limits on well-formed replies; None sets none.
    callbacks : Sequence[RoundCallback]
        Called with every round's report; one that raises `StopRun` ends the run.

    Raises
    ------
    ArgumentError
        A ValueError of one sentence: the argument, its value and what is allowed.
    """

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
        """Run the federation as `flwr.serverapp.strategy.Strategy.start` does, with two additions.

        ``evaluate_fn`` sees the served model (the moving average, if there is one), and
        ``Result.arrays`` holds it. A strategy restored from a checkpoint goes on after its last
        finished round, up to ``num_rounds`` in total.

        Raises
        ------
        FedFusionError
            If the run cannot go on, e.g. `RunStopped` or `NotEnoughNodes`.
        """
        self.num_rounds, self.timeout = num_rounds, timeout
        train, evaluate = train_config or ConfigRecord(), evaluate_config or ConfigRecord()
        result, progress, arrays = Result(), self.progress, initial_arrays
        log(INFO, "Starting %s strategy:", type(self).__name__)
        log_strategy_start_info(num_rounds, initial_arrays, train, evaluate)
        self.summary()
        try:
            if progress.rounds_done:
                arrays = protocol.record_from_state(progress.newest)
                log(INFO, "Resuming after round %d", progress.rounds_done)
            else:
                model = protocol.state_from_record(arrays)
                self.round = RoundInProgress(RoundReport(0), model, arrays)
                self._end_round(arrays, result, evaluate_fn)
            for server_round in range(progress.rounds_done + 1, num_rounds + 1):
                messages = self.configure_train(server_round, arrays, train, grid)
                replies = grid.send_and_receive(messages, timeout=timeout)
                new_arrays, metrics = self.aggregate_train(server_round, replies)
                if metrics is not None:
                    result.train_metrics_clientapp[server_round] = metrics
                arrays = arrays if new_arrays is None else new_arrays
                messages = self.configure_evaluate(server_round, arrays, evaluate, grid)
                replies = [
                    reply
                    for part in _parts_of_few_models(messages)
                    for reply in grid.send_and_receive(part, timeout=timeout)
                ]
                metrics = self.aggregate_evaluate(server_round, replies)
                if metrics is not None:
                    result.evaluate_metrics_clientapp[server_round] = metrics
                self._end_round(arrays, result, evaluate_fn)
        except StopRun as reason:
            log(INFO, "Ended after round %d: %s", progress.rounds_done, reason)
        if progress.failed_rounds >= num_rounds and self.fraction_train > 0:
            raise RunStopped(f"none of {num_rounds} rounds had enough valid replies; {WHERE}")
        served = progress.average.state
        result.arrays = protocol.record_from_state(served) if served else arrays
        return result

    def _end_round(
        self, arrays: ArrayRecord, result: Result, evaluate_fn: EvaluateFn | None
    ) -> None:
        """Evaluate on the server, and hand the round's report to the callbacks."""
        progress, report, server_round = self.progress, self.round.report, self.server_round
        progress.rounds_done, progress.newest = server_round, protocol.state_from_record(arrays)
        served = progress.average.state
        report.model = served or progress.newest
        due = server_round % self.central_evaluate_every == 0 or server_round == self.num_rounds
        if evaluate_fn is not None and due:
            arrays = protocol.record_from_state(served) if served else arrays
            central = evaluate_fn(server_round, arrays)
            if central is not None:
                result.evaluate_metrics_serverapp[server_round] = central
            for key, value in (central or {}).items():
                if isinstance(value, int | float):
                    report.metrics[key] = float(value)
        report.lap("evaluate")
        self._call_back()

    def summary(self) -> None:
        """Log the strategy's settings at the start of a run."""
        served = "pooled moments" if self.pool_moments else "averaged"
        lines = [
            *self.settings(),
            f"Server step: learning rate {self.server_learning_rate:g}, "
            f"momentum {self.server_momentum:g}",
            f"Served model: average decay {self.average_decay:g}",
            f"Running statistics: {served}",
            f"Valid replies: at least {self.min_valid_replies}, give up after "
            f"{self.max_failed_rounds} failed rounds",
            f"Defence: {self.defence or 'none'}",
            f"Fraction: train {self.fraction_train:.2f}, evaluate {self.fraction_evaluate:.2f}",
            f"Clients: at least {self.min_train_nodes} train, {self.min_evaluate_nodes} evaluate, "
            f"{self.min_available_nodes} to start",
        ]
        for line in lines:
            log(INFO, "\t├──> %s", line)


def _parts_of_few_models(messages: Iterable[Message]) -> Iterator[list[Message]]:
    """Split messages into parts that hold few distinct models each."""
    part: list[Message] = []
    models: set[int] = set()
    for message in messages:
        models |= {id(record) for record in message.content.array_records.values()}
        part.append(message)
        if len(models) == MODELS_IN_FLIGHT:
            yield part
            part, models = [], set()
    if part:
        yield part
