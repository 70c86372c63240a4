# SPDX-License-Identifier: Apache-2.0
"""What every strategy here shares: seeded sampling, messages, reply checks, costs, reports.

`SingleModelStrategy` and `MultiModelStrategy` stand on it; a strategy of one's own overrides a few
of `AlgorithmHooks` in one of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from logging import INFO, WARNING
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord
from flwr.common.logger import log
from flwr.serverapp import Grid
from flwr.serverapp.exception import AggregationError
from torch import Tensor

from fedfusion_flwr import protocol
from fedfusion_flwr.config import cohort_size
from fedfusion_flwr.errors import FedFusionError
from fedfusion_flwr.federation.algorithm import AlgorithmHooks, Exchange, KeepOldModel
from fedfusion_flwr.federation.bookkeeping import (
    add_costs_down,
    add_costs_up,
    book_replies,
    log_dropped,
    mean_metrics,
    split_train_time,
)
from fedfusion_flwr.federation.conversation import Conversation, Setting
from fedfusion_flwr.federation.defence import Defence
from fedfusion_flwr.federation.replies import ClientReply, Expected, ReplyJudge
from fedfusion_flwr.federation.roster import Roster
from fedfusion_flwr.federation.round import ClientRow, RoundCallback, RoundReport, State
from fedfusion_flwr.federation.sampling import random_cohort
from fedfusion_flwr.fusion import fuse_state_dicts
from fedfusion_flwr.randomness import numpy_generator

__all__ = ["BaseStrategy", "Exchange", "KeepOldModel", "RunStopped"]

_WHERE = "the reason of every dropped reply is in the log and in clients.jsonl"


class RunStopped(FedFusionError, AggregationError):
    """Several rounds in a row had too few usable replies; what was written so far stays."""


class BaseStrategy(AlgorithmHooks):
    """Checked replies, seeded sampling, personal evaluation and reports; without an algorithm.

    Parameters
    ----------
    average_decay : float
        Decay of the moving average of global models that is evaluated, saved and returned; training
        goes on from the newest model. 0 serves the newest.
    pool_moments : bool
        Fuse running statistics as moments of the mixture instead of averaging variances.
    evaluate_every : int
        Clients evaluate in every so many rounds, and in the last.
    min_valid_replies : int
        With fewer good replies the round keeps the old model.
    max_failed_rounds : int
        That many such rounds in a row end the run with `RunStopped`.
    max_examples : int
        Largest example count that is believed.
    max_update_ratio : float
        An aggregate farther from the old model than this times the old model's norm is refused.
    node_timeout : float
        Seconds to wait for ``min_available_nodes`` before round 1.
    defence : Defence or None
        What well-formed replies may not do either; None lets them.
    callbacks : Sequence[RoundCallback]
        See every round's report.
    **hooks
        Arguments of `AlgorithmHooks` and of Flower's FedAvg: ``fraction_train``, ...
    """

    STATE = (*AlgorithmHooks.STATE, "failed_rounds", "roster", "defence")

    def __init__(
        self,
        *,
        average_decay: float = 0.0,
        pool_moments: bool = True,
        evaluate_every: int = 1,
        min_valid_replies: int = 1,
        max_failed_rounds: int = 3,
        max_examples: int = 10_000_000,
        max_update_ratio: float = 10.0,
        node_timeout: float = 60.0,
        defence: Defence | None = None,
        callbacks: Sequence[RoundCallback] = (),
        **hooks: Any,
    ) -> None:
        super().__init__(average_decay=average_decay, callbacks=callbacks, **hooks)
        self.pool_moments = pool_moments
        self.evaluate_every = evaluate_every
        self.min_valid_replies = min_valid_replies
        self.max_failed_rounds = max_failed_rounds
        self.max_examples = max_examples
        self.max_update_ratio = max_update_ratio
        self.node_timeout = node_timeout
        self.defence = defence
        self.roster = Roster()
        self.failed_rounds = 0

    # --- Flower's interface ---------------------------------------------------------------------

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Sample clients and address their models to them."""
        self._stopwatch.restart()
        self.report = RoundReport(server_round)
        self._round = Conversation(server_round, protocol.state_from_record(arrays), arrays)
        if self.fraction_train == 0.0:
            return []
        connected = self._connected(server_round, grid)

        def exchange(
            clients: Sequence[int], state: State, settings: Mapping[str, Setting]
        ) -> list[ClientReply]:
            return self._exchange(grid, config, connected, clients, state, settings)

        self.prepare_round(sorted(connected), exchange)
        size = max(cohort_size(len(connected), self.fraction_train), self.min_train_nodes)
        cohort = self.sample_clients(server_round, sorted(connected), size)
        self.prepare_cohort(cohort, exchange)
        self._round.ask({connected[client]: client for client in cohort}, self.sent_to)
        messages = self._messages(MessageType.TRAIN, config, self.train_settings)
        self.report.num_sampled = len(cohort)
        self._stopwatch.lap(self.report, "sample")
        return messages

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Check the replies and let the algorithm make the next model of the good ones."""
        replies = list(replies)
        self._stopwatch.lap(self.report, "train")
        if self.fraction_train == 0.0:
            return None, None
        good, bad = self._judge(replies, self.expected_from, self.check_reply)
        book_replies(self.report, good, bad)
        self._stopwatch.lap(self.report, "aggregate")
        if len(good) < self.min_valid_replies:
            why = f"{len(good)} valid replies, min-valid-replies is {self.min_valid_replies}"
            return self._keep_old_model(why, good)
        try:
            model = self.advance(good)
        except KeepOldModel as why:
            return self._keep_old_model(str(why), good)
        self.failed_rounds = 0
        self.average.update(model)
        self.report.metrics["server-aggregations"] = 1.0
        split_train_time(self.report, good)
        self._stopwatch.lap(self.report, "aggregate")
        means = mean_metrics(good, self.train_metrics_aggr_fn)
        # What the round itself counted is not a client's to say.
        self.report.metrics = {**means, **self.report.metrics}
        return protocol.record_from_state(model), MetricRecord(dict(self.report.metrics))

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Address to a seeded sample of clients the model that serves each."""
        self._round.sampled = {}
        if not self.evaluates(server_round):
            return []
        connected = self._connected(server_round, grid)
        size = max(cohort_size(len(connected), self.fraction_evaluate), self.min_evaluate_nodes)
        generator = numpy_generator(self.seed, "evaluation-sampling", server_round)
        cohort = random_cohort(sorted(connected), size, generator)
        self.prepare_evaluation()
        self._round.ask({connected[client]: client for client in cohort}, self.personal_model)
        return self._messages(MessageType.EVALUATE, config, self.evaluate_settings)

    def evaluates(self, server_round: int) -> bool:
        """Whether clients evaluate in this round."""
        due = server_round % self.evaluate_every == 0 or server_round == self.num_rounds
        return self.fraction_evaluate > 0 and due

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        """Example-weighted means of the clients' finite evaluation metrics."""
        if not self._round.sampled:
            return None
        good, bad = self._judge(replies, None)
        self.report.metrics["evaluate-replies-valid"] = float(len(good))
        self.report.metrics["evaluate-replies-dropped"] = float(len(bad))
        log_dropped(server_round, "evaluation", bad)
        means = mean_metrics(good, self.evaluate_metrics_aggr_fn)
        self.report.metrics = {**means, **self.report.metrics}
        self._stopwatch.lap(self.report, "evaluate")
        return MetricRecord(dict(means)) if means else None

    def summary(self) -> None:
        """Log the strategy's settings at the start of a run."""
        log(INFO, "\t├──> Served model: average decay %g", self.average.decay)
        log(
            INFO,
            "\t├──> Running statistics: %s",
            "pooled moments" if self.pool_moments else "averaged",
        )
        log(
            INFO,
            "\t├──> Valid replies: at least %d, give up after %d failed rounds",
            self.min_valid_replies,
            self.max_failed_rounds,
        )
        log(INFO, "\t├──> Defence: %s", self.defence or "none")
        super().summary()

    def check_outcome(self, num_rounds: int) -> None:
        """Refuse to call a run a success in which no round was."""
        if self.failed_rounds >= num_rounds and self.fraction_train > 0:
            raise RunStopped(f"none of {num_rounds} rounds had enough valid replies; {_WHERE}")

    def fuse_states(self, states: Iterable[Mapping[str, Tensor]], weights: Tensor) -> State:
        """The weighted mean that all share; running statistics as ``pool_moments`` says."""
        return fuse_state_dicts(states, weights, pool_moments=self.pool_moments)

    # --- plumbing -------------------------------------------------------------------------------

    def _connected(self, server_round: int, grid: Grid) -> dict[int, int]:
        if server_round == 1:
            expected = max(self.min_available_nodes, self.min_train_nodes)
            return self.roster.wait_for(grid, expected, self.node_timeout)
        return self.roster.connected(grid)

    def _messages(
        self,
        message_type: str,
        config: ConfigRecord,
        settings_of: Callable[[int], Mapping[str, Setting]],
    ) -> list[Message]:
        keys = self.arrayrecord_key, self.configrecord_key
        messages = self._round.messages(message_type, config, settings_of, keys)
        if message_type == MessageType.TRAIN:
            add_costs_down(self.report, messages)
        return messages

    def _exchange(
        self,
        grid: Grid,
        config: ConfigRecord,
        connected: Mapping[int, int],
        clients: Sequence[int],
        state: State,
        settings: Mapping[str, Setting],
    ) -> list[ClientReply]:
        self._stopwatch.lap(self.report, "sample")
        self._round.ask({connected[client]: client for client in clients}, lambda _: state)
        messages = self._messages(MessageType.TRAIN, config, lambda _: settings)
        replies = list(grid.send_and_receive(messages, timeout=self.timeout))
        phase = str(settings.get(protocol.PHASE, protocol.TRAINING))
        good, bad = self._judge(replies, lambda *_: state, phase=phase)
        book_replies(self.report, good, bad)
        self._stopwatch.lap(self.report, "exchange")
        return good

    def _judge(
        self,
        replies: Iterable[Message],
        expected: Expected | None,
        check: Callable[[ClientReply], None] = lambda _: None,
        phase: str = protocol.TRAINING,
    ) -> tuple[list[ClientReply], list[ClientRow]]:
        """Split into good and bad; ``expected`` is what models were trained from, if any."""
        replies = list(replies)
        judge = ReplyJudge(
            self._round.server_round,
            self._round.sampled,
            expected,
            check,
            num_channels=self.num_channels(),
            arrays_key=self.arrayrecord_key,
            examples_key=self.weighted_by_key,
            max_examples=self.max_examples,
            max_update_ratio=self.max_update_ratio,
        )
        good, bad = judge.judge(replies)
        if self.defence is not None:
            good, outliers = self.defence.screen(good, expected, self.report, phase)
            bad += outliers
        if expected is not None:
            add_costs_up(self.report, replies, good)
        return good, bad

    def _keep_old_model(
        self, why: str, good: list[ClientReply]
    ) -> tuple[ArrayRecord, MetricRecord]:
        self.failed_rounds += 1
        self.report.clients = [reply.row() for reply in good] + self.report.clients
        self.report.metrics["round-failed"] = 1.0
        log(WARNING, "round %d keeps the old model: %s", self._round.server_round, why)
        if self.failed_rounds >= self.max_failed_rounds:
            # Flower's loop ends here, so nobody else would hand this round to the callbacks.
            self.report_round()
            raise RunStopped(
                f"stopped after {self.failed_rounds} failed rounds in a row, the last because of: "
                f"{why}; {_WHERE}"
            )
        return self._round.record, MetricRecord(dict(self.report.metrics))
