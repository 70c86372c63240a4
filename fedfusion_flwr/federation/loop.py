# SPDX-License-Identifier: Apache-2.0
"""The loop over the rounds: central evaluation, reports, callbacks, and resuming."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from logging import INFO
from typing import TYPE_CHECKING, Self

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.common.logger import log
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result
from flwr.serverapp.strategy.strategy_utils import log_strategy_start_info

from fedfusion_flwr import protocol
from fedfusion_flwr.federation.conversation import WHERE, RoundInProgress, RunStopped
from fedfusion_flwr.federation.options import ServerUpdate, Serving
from fedfusion_flwr.federation.roster import Roster
from fedfusion_flwr.federation.round import State, StopRun
from fedfusion_flwr.fusion import ServedAverage, ServerStep

if TYPE_CHECKING:
    from fedfusion_flwr.federation.strategy import FederatedStrategy

EvaluateFn = Callable[[int, ArrayRecord], MetricRecord | None]

MODELS_IN_FLIGHT = 16
"""Most distinct models sent out for evaluation at a time; each is held in memory."""


@dataclass
class Progress:
    """What every strategy carries from round to round; stored in checkpoints.

    ``newest`` is the global model after ``rounds_done`` rounds; ``clip_bounds`` holds the defence's
    bound by phase.
    """

    average: ServedAverage
    step: ServerStep
    roster: Roster = field(default_factory=Roster)
    rounds_done: int = 0
    newest: State = field(default_factory=dict)
    failed_rounds: int = 0
    clip_bounds: dict[str, float] = field(default_factory=dict)

    @classmethod
    def start(cls, serving: Serving, update: ServerUpdate) -> Self:
        """Before the first round."""
        step = ServerStep(update.server_learning_rate, update.server_momentum)
        return cls(ServedAverage(serving.average_decay), step)


def run_rounds(
    strategy: FederatedStrategy,
    grid: Grid,
    initial_arrays: ArrayRecord,
    train_config: ConfigRecord,
    evaluate_config: ConfigRecord,
    evaluate_fn: EvaluateFn | None,
) -> Result:
    """Run the remaining rounds; see `FederatedStrategy.start`."""
    progress, num_rounds = strategy.progress, strategy.num_rounds
    log(INFO, "Starting %s strategy:", type(strategy).__name__)
    log_strategy_start_info(num_rounds, initial_arrays, train_config, evaluate_config)
    strategy.summary()
    result = Result()
    arrays = initial_arrays
    if progress.rounds_done:
        arrays = protocol.record_from_state(progress.newest)
        log(INFO, "Resuming after round %d", progress.rounds_done)
    try:
        if not progress.rounds_done:
            state = protocol.state_from_record(arrays)
            strategy.round = RoundInProgress(strategy, 0, state, arrays)
            _end_round(strategy, arrays, result, evaluate_fn)
        for server_round in range(progress.rounds_done + 1, num_rounds + 1):
            messages = strategy.configure_train(server_round, arrays, train_config, grid)
            replies = grid.send_and_receive(messages, timeout=strategy.timeout)
            new_arrays, metrics = strategy.aggregate_train(server_round, replies)
            if metrics is not None:
                result.train_metrics_clientapp[server_round] = metrics
            arrays = arrays if new_arrays is None else new_arrays
            messages = strategy.configure_evaluate(server_round, arrays, evaluate_config, grid)
            replies = [
                reply
                for part in parts_of_few_models(messages)
                for reply in grid.send_and_receive(part, timeout=strategy.timeout)
            ]
            metrics = strategy.aggregate_evaluate(server_round, replies)
            if metrics is not None:
                result.evaluate_metrics_clientapp[server_round] = metrics
            _end_round(strategy, arrays, result, evaluate_fn)
    except StopRun as reason:
        log(INFO, "Ended after round %d: %s", progress.rounds_done, reason)
    if progress.failed_rounds >= num_rounds and strategy.fraction_train > 0:
        raise RunStopped(f"none of {num_rounds} rounds had enough valid replies; {WHERE}")
    served = progress.average.state
    result.arrays = protocol.record_from_state(served) if served else arrays
    return result


def parts_of_few_models(messages: Iterable[Message]) -> Iterator[list[Message]]:
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


def _end_round(
    strategy: FederatedStrategy,
    arrays: ArrayRecord,
    result: Result,
    evaluate_fn: EvaluateFn | None,
) -> None:
    progress, report = strategy.progress, strategy.round.report
    server_round = report.server_round
    progress.rounds_done, progress.newest = server_round, protocol.state_from_record(arrays)
    served = progress.average.state
    report.model = served or progress.newest
    every, last = strategy.central_evaluate_every, strategy.num_rounds
    if evaluate_fn is not None and (server_round % every == 0 or server_round == last):
        central = evaluate_fn(
            server_round, protocol.record_from_state(served) if served else arrays
        )
        if central is not None:
            result.evaluate_metrics_serverapp[server_round] = central
        for key, value in (central or {}).items():
            if isinstance(value, int | float):
                report.metrics[key] = float(value)
    strategy.round.stopwatch.lap(report, "evaluate")
    strategy.round.end()
