# SPDX-License-Identifier: Apache-2.0
"""One round: who is asked, what each client is sent, and which replies count."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from logging import WARNING

from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.common.logger import log
from flwr.serverapp import Grid
from flwr.serverapp.exception import AggregationError

from fedfusion_flwr import protocol
from fedfusion_flwr.config import cohort_size
from fedfusion_flwr.errors import FedFusionError
from fedfusion_flwr.federation.algorithm import Algorithm
from fedfusion_flwr.federation.bookkeeping import (
    MetricsMean,
    book_replies,
    count_bytes,
    log_dropped,
    mean_metrics,
    split_train_time,
)
from fedfusion_flwr.federation.defence import Defence
from fedfusion_flwr.federation.replies import ClientReply, Expected, ReplyJudge
from fedfusion_flwr.federation.round import (
    ClientRow,
    KeepOldModel,
    RoundCallback,
    RoundInProgress,
    RoundReport,
    Setting,
    State,
)
from fedfusion_flwr.federation.sampling import random_cohort
from fedfusion_flwr.randomness import numpy_generator

WHERE = "the reason of every dropped reply is in the log and in clients.jsonl"


class RunStopped(FedFusionError, AggregationError):
    """Several rounds in a row had too few usable replies; what was written so far stays."""


@dataclass(kw_only=True, eq=False, repr=False)
class Conversation(Algorithm):
    """Flower's interface for one round, in terms of the algorithm's hooks."""

    weighted_by_key: str = "num-examples"
    arrayrecord_key: str = "arrays"
    configrecord_key: str = "config"
    train_metrics_aggr_fn: MetricsMean | None = None
    evaluate_metrics_aggr_fn: MetricsMean | None = None
    defence: Defence | None = None
    callbacks: Sequence[RoundCallback] = ()
    timeout: float = field(init=False, default=3600.0)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.callbacks = list(self.callbacks)

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Sample clients and make their train messages."""
        report = RoundReport(server_round)
        self.round = RoundInProgress(report, protocol.state_from_record(arrays), arrays)
        if self.fraction_train == 0.0:
            return []
        connected = self._connected_clients(grid)

        def exchange(
            clients: Sequence[int], state: State, settings: Mapping[str, Setting]
        ) -> list[ClientReply]:
            report.lap("sample")
            messages = self._ask(connected, clients, lambda _: state, config, lambda _: settings)
            replies = grid.send_and_receive(messages, timeout=self.timeout)
            phase = str(settings.get(protocol.PHASE, protocol.TRAINING))
            good, _ = self._judge_replies(replies, lambda *_: state, phase=phase)
            report.lap("exchange")
            return good

        self.prepare_round(sorted(connected), exchange)
        size = max(cohort_size(len(connected), self.fraction_train), self.min_train_nodes)
        cohort = self.sample_clients(server_round, sorted(connected), size)
        self.prepare_cohort(cohort, exchange)
        messages = self._ask(connected, cohort, self.sent_to, config, self.train_settings)
        report.num_sampled = len(cohort)
        report.lap("sample")
        return messages

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Check the replies and let the algorithm make the next model from the good ones."""
        report, replies = self.round.report, list(replies)
        report.lap("train")
        if self.fraction_train == 0.0:
            return None, None
        good, _ = self._judge_replies(replies, self.expected_from, self.check_reply)
        report.lap("aggregate")
        try:
            if len(good) < self.min_valid_replies:
                raise KeepOldModel(
                    f"{len(good)} valid replies, min-valid-replies is {self.min_valid_replies}"
                )
            update = self.advance(good)
        except KeepOldModel as why:
            self._count_failure(str(why), good)
            return self.round.record, MetricRecord(dict(report.metrics))
        self.progress.failed_rounds = 0
        average = self.progress.average
        if update.model is not self.current or not average.state:
            # A model that stays is not averaged again.
            average.update(update.model)
        report.clients = update.rows + report.clients
        report.metrics |= {**update.metrics, "server-aggregations": 1.0}
        report.clusters, report.fusion = update.clusters, update.fusion
        split_train_time(report, good)
        report.lap("aggregate", update.seconds)
        # A client's metric never replaces what the server counted itself.
        means = mean_metrics(good, self.train_metrics_aggr_fn)
        report.metrics = {**means, **report.metrics}
        return protocol.record_from_state(update.model), MetricRecord(dict(report.metrics))

    def _count_failure(self, why: str, good: list[ClientReply]) -> None:
        """Record a round that keeps the old model; too many in a row end the run."""
        report, progress = self.round.report, self.progress
        progress.failed_rounds += 1
        report.clients = [reply.row() for reply in good] + report.clients
        report.metrics["round-failed"] = 1.0
        log(WARNING, "round %d keeps the old model: %s", self.server_round, why)
        if progress.failed_rounds >= self.max_failed_rounds:
            # The run ends here, so the loop will not call the callbacks for this round.
            self._call_back()
            raise RunStopped(
                f"stopped after {progress.failed_rounds} failed rounds in a row, the last because "
                f"of: {why}; {WHERE}"
            )

    def _call_back(self) -> None:
        for callback in self.callbacks:
            callback.on_round_end(self.round.report)

    # --- evaluation -----------------------------------------------------------------------------

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterator[Message]:
        """Yield evaluate messages to a seeded sample of clients, each with the model it gets."""
        self.round.sampled, self.round.sent = {}, {}
        if not self.evaluates(server_round):
            return
        connected = self._connected_clients(grid)
        wanted = cohort_size(len(connected), self.fraction_evaluate)
        generator = numpy_generator(self.seed, "evaluation-sampling", server_round)
        size = max(wanted, self.min_evaluate_nodes)
        cohort = random_cohort(sorted(connected), size, generator)
        self.round.sampled = {connected[client]: client for client in cohort}
        self.prepare_evaluation()
        # A model that serves several clients is encoded once; others are held one at a time.
        shared = {id(state) for state in (self.served, *self.models().values())}
        yield from self._encoded_messages(
            MessageType.EVALUATE, self.personal_model, config, self.evaluate_settings, shared
        )

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        """Example-weighted means of the clients' finite evaluation metrics."""
        if not self.round.sampled:
            return None
        report = self.round.report
        good, bad = self._judge_replies(replies, None)
        report.metrics["evaluate-replies-valid"] = float(len(good))
        report.metrics["evaluate-replies-dropped"] = float(len(bad))
        log_dropped(server_round, "evaluation", bad)
        means = mean_metrics(good, self.evaluate_metrics_aggr_fn)
        report.metrics = {**means, **report.metrics}
        report.lap("evaluate")
        return MetricRecord(dict(means)) if means else None

    # --- who is asked, and which replies count --------------------------------------------------

    def _connected_clients(self, grid: Grid) -> dict[int, int]:
        """Node id by client id; the first round waits for clients."""
        if self.server_round == 1:
            expected = max(self.min_available_nodes, self.min_train_nodes)
            return self.progress.roster.wait_for(grid, expected, self.node_timeout)
        return self.progress.roster.connected(grid)

    def _ask(
        self,
        connected: Mapping[int, int],
        clients: Sequence[int],
        state_of: Callable[[int], State],
        config: ConfigRecord,
        settings_of: Callable[[int], Mapping[str, Setting]],
    ) -> list[Message]:
        """Make each client's train message, and note what it is sent."""
        self.round.sampled = {connected[client]: client for client in clients}
        self.round.sent = {client: state_of(client) for client in clients}
        sent = self.round.sent.__getitem__
        messages = [*self._encoded_messages(MessageType.TRAIN, sent, config, settings_of)]
        self.round.report.add("bytes-down", count_bytes(messages))
        return messages

    def _encoded_messages(
        self,
        kind: str,
        state_of: Callable[[int], State],
        config: ConfigRecord,
        settings_of: Callable[[int], Mapping[str, Setting]],
        shared: set[int] | None = None,
    ) -> Iterator[Message]:
        """A message to each sampled client; models that are one object are encoded once.

        With ``shared``, the encoded models of other ids are forgotten at the next one.
        """
        encoded = {id(self.round.model): (self.round.model, self.round.record)}
        for node, client in self.round.sampled.items():
            state = state_of(client)
            if id(state) not in encoded:
                if shared is not None:
                    encoded = {key: pair for key, pair in encoded.items() if key in shared}
                encoded[id(state)] = state, protocol.record_from_state(state)
            sent = ConfigRecord({**config, protocol.SERVER_ROUND: self.server_round})
            sent.update(settings_of(client))
            content = RecordDict({self.arrayrecord_key: encoded[id(state)][1]})
            content[self.configrecord_key] = sent
            yield Message(content, node, kind)

    def _judge_replies(
        self,
        replies: Iterable[Message],
        expected: Expected | None,
        check: Callable[[ClientReply], None] = lambda _: None,
        phase: str = protocol.TRAINING,
    ) -> tuple[list[ClientReply], list[ClientRow]]:
        """Split into good and bad; ``expected`` gives the model a client trained from, if any."""
        report, replies = self.round.report, list(replies)
        judge = ReplyJudge(
            self.server_round,
            self.round.sampled,
            expected,
            check,
            num_channels=self.num_channels(),
            arrays_key=self.arrayrecord_key,
            examples_key=self.weighted_by_key,
            plausibility=self,
        )
        good, bad = judge.judge(replies)
        if self.defence is not None:
            bounds = self.progress.clip_bounds
            good, outliers = self.defence.screen(good, expected, report, phase, bounds)
            bad += outliers
        if expected is not None:
            book_replies(report, replies, good, bad)
        return good, bad
