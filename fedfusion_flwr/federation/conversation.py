# SPDX-License-Identifier: Apache-2.0
"""A round in progress: who is asked, what each client is sent, and which replies count."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from logging import WARNING
from typing import TYPE_CHECKING

from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.common.logger import log
from flwr.serverapp import Grid
from flwr.serverapp.exception import AggregationError

from fedfusion_flwr import protocol
from fedfusion_flwr.config import cohort_size
from fedfusion_flwr.errors import FedFusionError
from fedfusion_flwr.federation.bookkeeping import (
    Stopwatch,
    add_costs_down,
    add_costs_up,
    book_replies,
    log_dropped,
    mean_metrics,
    split_train_time,
)
from fedfusion_flwr.federation.options import Plausibility
from fedfusion_flwr.federation.replies import ClientReply, Expected, ReplyJudge
from fedfusion_flwr.federation.round import ClientRow, KeepOldModel, RoundReport, State
from fedfusion_flwr.federation.sampling import random_cohort
from fedfusion_flwr.randomness import numpy_generator

if TYPE_CHECKING:
    from fedfusion_flwr.federation.strategy import FederatedStrategy

Setting = str | int | float | bool | list[str]
Exchange = Callable[[Sequence[int], State, Mapping[str, Setting]], list[ClientReply]]
"""Have clients train a model in addition to the round's training; returns the good replies."""

WHERE = "the reason of every dropped reply is in the log and in clients.jsonl"


class RunStopped(FedFusionError, AggregationError):
    """Several rounds in a row had too few usable replies; what was written so far stays."""


class RoundInProgress:
    """One round of a strategy.

    Parameters
    ----------
    strategy : FederatedStrategy
        Its settings and hooks are used.
    server_round : int
        Number of the round.
    model, record : State, ArrayRecord
        The global model at the start of the round, in both forms.
    """

    def __init__(
        self, strategy: FederatedStrategy, server_round: int, model: State, record: ArrayRecord
    ) -> None:
        self.strategy = strategy
        self.server_round = server_round
        self.model = model
        self.record = record
        self.report = RoundReport(server_round)
        self.stopwatch = Stopwatch()
        self.sampled: dict[int, int] = {}
        """Client id by node id, of the clients that were asked last."""
        self.sent: dict[int, State] = {}
        """The model that each of them was sent, by client id."""

    # --- training -------------------------------------------------------------------------------

    def configure_train(self, config: ConfigRecord, grid: Grid) -> list[Message]:
        """Draw the cohort and make its train messages."""
        strategy = self.strategy
        if strategy.fraction_train == 0.0:
            return []
        connected = self._connected(grid)

        def exchange(
            clients: Sequence[int], state: State, settings: Mapping[str, Setting]
        ) -> list[ClientReply]:
            self.stopwatch.lap(self.report, "sample")
            messages = self._ask(connected, clients, lambda _: state, config, lambda _: settings)
            replies = list(grid.send_and_receive(messages, timeout=strategy.timeout))
            phase = str(settings.get(protocol.PHASE, protocol.TRAINING))
            good, bad = self._judge(replies, lambda *_: state, phase=phase)
            book_replies(self.report, good, bad)
            self.stopwatch.lap(self.report, "exchange")
            return good

        strategy.prepare_round(sorted(connected), exchange)
        size = max(cohort_size(len(connected), strategy.fraction_train), strategy.min_train_nodes)
        cohort = strategy.sample_clients(self.server_round, sorted(connected), size)
        strategy.prepare_cohort(cohort, exchange)
        messages = self._ask(connected, cohort, strategy.sent_to, config, strategy.train_settings)
        self.report.num_sampled = len(cohort)
        self.stopwatch.lap(self.report, "sample")
        return messages

    def aggregate_train(
        self, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Check the replies, let the algorithm advance, and record the result."""
        strategy, report = self.strategy, self.report
        replies = list(replies)
        self.stopwatch.lap(report, "train")
        if strategy.fraction_train == 0.0:
            return None, None
        good, bad = self._judge(replies, strategy.expected_from, strategy.check_reply)
        book_replies(report, good, bad)
        self.stopwatch.lap(report, "aggregate")
        if len(good) < strategy.min_valid_replies:
            why = f"{len(good)} valid replies, min-valid-replies is {strategy.min_valid_replies}"
            return self._keep_old_model(why, good)
        try:
            update = strategy.advance(good)
        except KeepOldModel as why:
            return self._keep_old_model(str(why), good)
        strategy.progress.failed_rounds = 0
        strategy.progress.average.update(update.model)
        report.book(update)
        report.metrics["server-aggregations"] = 1.0
        split_train_time(report, good)
        self.stopwatch.lap(report, "aggregate", update.seconds)
        # A client's metric never replaces what the server counted itself.
        means = mean_metrics(good, strategy.train_metrics_aggr_fn)
        report.metrics = {**means, **report.metrics}
        return protocol.record_from_state(update.model), MetricRecord(dict(report.metrics))

    def _keep_old_model(
        self, why: str, good: list[ClientReply]
    ) -> tuple[ArrayRecord, MetricRecord]:
        strategy, report, progress = self.strategy, self.report, self.strategy.progress
        progress.failed_rounds += 1
        report.clients = [reply.row() for reply in good] + report.clients
        report.metrics["round-failed"] = 1.0
        log(WARNING, "round %d keeps the old model: %s", self.server_round, why)
        if progress.failed_rounds >= strategy.max_failed_rounds:
            # The run ends here, so the loop will not call the callbacks for this round.
            self.end()
            raise RunStopped(
                f"stopped after {progress.failed_rounds} failed rounds in a row, the last because "
                f"of: {why}; {WHERE}"
            )
        return self.record, MetricRecord(dict(report.metrics))

    # --- evaluation -----------------------------------------------------------------------------

    def configure_evaluate(self, config: ConfigRecord, grid: Grid) -> Iterator[Message]:
        """Yield evaluate messages to a seeded sample of clients, each with the model it gets."""
        strategy = self.strategy
        self.sampled, self.sent = {}, {}
        if not strategy.evaluates(self.server_round):
            return
        connected = self._connected(grid)
        wanted = cohort_size(len(connected), strategy.fraction_evaluate)
        generator = numpy_generator(strategy.seed, "evaluation-sampling", self.server_round)
        size = max(wanted, strategy.min_evaluate_nodes)
        cohort = random_cohort(sorted(connected), size, generator)
        self.sampled = {connected[client]: client for client in cohort}
        strategy.prepare_evaluation()
        # A model that serves several clients is encoded once; others are held one at a time.
        shared = [strategy.served, *strategy.models().values()]
        encoded: list[tuple[State, ArrayRecord]] = []
        for node, client in self.sampled.items():
            state = strategy.personal_model(client)
            record = next((record for known, record in encoded if known is state), None)
            if record is None:
                record = protocol.record_from_state(state)
                encoded = [pair for pair in encoded if any(pair[0] is kept for kept in shared)]
                encoded.append((state, record))
            settings = strategy.evaluate_settings(client)
            yield self._message(MessageType.EVALUATE, node, record, config, settings)

    def aggregate_evaluate(self, replies: Iterable[Message]) -> MetricRecord | None:
        """Example-weighted means of the clients' finite evaluation metrics."""
        if not self.sampled:
            return None
        good, bad = self._judge(replies, None)
        self.report.metrics["evaluate-replies-valid"] = float(len(good))
        self.report.metrics["evaluate-replies-dropped"] = float(len(bad))
        log_dropped(self.server_round, "evaluation", bad)
        means = mean_metrics(good, self.strategy.evaluate_metrics_aggr_fn)
        self.report.metrics = {**means, **self.report.metrics}
        self.stopwatch.lap(self.report, "evaluate")
        return MetricRecord(dict(means)) if means else None

    def end(self) -> None:
        """Hand the round's report to the callbacks."""
        for callback in self.strategy.callbacks:
            callback.on_round_end(self.report)

    # --- plumbing -------------------------------------------------------------------------------

    def _connected(self, grid: Grid) -> dict[int, int]:
        strategy, roster = self.strategy, self.strategy.progress.roster
        if self.server_round == 1:
            expected = max(strategy.min_available_nodes, strategy.min_train_nodes)
            return roster.wait_for(grid, expected, strategy.node_timeout)
        return roster.connected(grid)

    def _ask(
        self,
        connected: Mapping[int, int],
        clients: Sequence[int],
        state_of: Callable[[int], State],
        config: ConfigRecord,
        settings_of: Callable[[int], Mapping[str, Setting]],
    ) -> list[Message]:
        """Make each client's train message; models that are one object are encoded once."""
        self.sampled = {connected[client]: client for client in clients}
        self.sent = {client: state_of(client) for client in clients}
        records = {id(self.model): self.record}
        messages = []
        for node, client in self.sampled.items():
            state = self.sent[client]
            if id(state) not in records:
                records[id(state)] = protocol.record_from_state(state)
            record, settings = records[id(state)], settings_of(client)
            messages.append(self._message(MessageType.TRAIN, node, record, config, settings))
        add_costs_down(self.report, messages)
        return messages

    def _message(
        self,
        message_type: str,
        node: int,
        record: ArrayRecord,
        config: ConfigRecord,
        settings: Mapping[str, Setting],
    ) -> Message:
        sent = ConfigRecord({**config, protocol.SERVER_ROUND: self.server_round})
        sent.update(settings)
        keys = self.strategy.arrayrecord_key, self.strategy.configrecord_key
        return Message(RecordDict(dict(zip(keys, (record, sent), strict=True))), node, message_type)

    def _judge(
        self,
        replies: Iterable[Message],
        expected: Expected | None,
        check: Callable[[ClientReply], None] = lambda _: None,
        phase: str = protocol.TRAINING,
    ) -> tuple[list[ClientReply], list[ClientRow]]:
        """Split into good and bad; ``expected`` gives the model a client trained from, if any."""
        replies, strategy = list(replies), self.strategy
        judge = ReplyJudge(
            self.server_round,
            self.sampled,
            expected,
            check,
            num_channels=strategy.num_channels(),
            arrays_key=strategy.arrayrecord_key,
            examples_key=strategy.weighted_by_key,
            plausibility=Plausibility.of(strategy),
        )
        good, bad = judge.judge(replies)
        if strategy.defence is not None:
            bounds = strategy.progress.clip_bounds
            good, outliers = strategy.defence.screen(good, expected, self.report, phase, bounds)
            bad += outliers
        if expected is not None:
            add_costs_up(self.report, replies, good)
        return good, bad
