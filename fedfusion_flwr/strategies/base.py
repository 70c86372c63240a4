# SPDX-License-Identifier: Apache-2.0
"""What every strategy here shares: seeded sampling, reply checks, fusion, server step, reports.

A strategy of one's own overrides `client_weights` (and perhaps `sample_clients`); the rest stays.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from logging import INFO, WARNING
from typing import Any

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.common.logger import log
from flwr.serverapp import Grid
from flwr.serverapp.exception import AggregationError
from torch import Tensor

from fedfusion_flwr import protocol
from fedfusion_flwr.config import cohort_size
from fedfusion_flwr.errors import FedFusionError
from fedfusion_flwr.fusion import (
    ServerStep,
    cap_weights,
    fuse_state_dicts,
)
from fedfusion_flwr.fusion.server_step import implausible
from fedfusion_flwr.fusion.statistics import LayerChoice, batchnorm_prefixes, select_layers
from fedfusion_flwr.fusion.threads import one_thread
from fedfusion_flwr.randomness import numpy_generator
from fedfusion_flwr.rounds import RoundCallback, RoundReport, State
from fedfusion_flwr.strategies.bookkeeping import (
    book_replies,
    log_dropped,
    mean_metrics,
    split_train_time,
)
from fedfusion_flwr.strategies.replies import ClientReply, ReplyJudge
from fedfusion_flwr.strategies.reporting import ReportingFedAvg
from fedfusion_flwr.strategies.roster import Roster
from fedfusion_flwr.strategies.sampling import random_cohort

_WHERE = "the reason of every dropped reply is in the log and in clients.jsonl"


class RunStopped(FedFusionError, AggregationError):
    """Several rounds in a row had too few usable replies; what was written so far stays."""


@dataclass
class _Round:
    """The round in progress."""

    number: int
    sent: State
    sampled: dict[int, int] = field(default_factory=dict)


class BaseStrategy(ReportingFedAvg):
    """Federated averaging with checked replies, seeded sampling and pooled moments.

    Parameters
    ----------
    seed : int
        Seed of client sampling.
    server_learning_rate, server_momentum : float
        The aggregate is a pseudo-gradient; 1 and 0 take the aggregate as it is.
    average_decay : float
        Decay of the moving average of global models that is evaluated, saved and returned; training
        goes on from the newest model. 0 serves the newest.
    pool_moments : bool
        Fuse running statistics as moments of the mixture instead of averaging variances.
    max_client_weight : float
        Upper limit of one client's weight in the global model; 1 is no limit.
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
    statistics_layers : {"all", "ends"}
        Which normalization layers' statistics the clients report.
    callbacks : Sequence[RoundCallback]
        See every round's report.
    **flower
        Arguments of `flwr.serverapp.strategy.FedAvg`: ``fraction_train``, ``min_train_nodes``, ...
    """

    def __init__(
        self,
        *,
        seed: int = 0,
        server_learning_rate: float = 1.0,
        server_momentum: float = 0.0,
        average_decay: float = 0.0,
        pool_moments: bool = True,
        max_client_weight: float = 1.0,
        min_valid_replies: int = 1,
        max_failed_rounds: int = 3,
        max_examples: int = 10_000_000,
        max_update_ratio: float = 10.0,
        node_timeout: float = 60.0,
        statistics_layers: LayerChoice = "all",
        callbacks: Sequence[RoundCallback] = (),
        **flower: Any,
    ) -> None:
        super().__init__(average_decay=average_decay, callbacks=callbacks, **flower)
        self.seed = seed
        self.pool_moments = pool_moments
        self.max_client_weight = max_client_weight
        self.min_valid_replies = min_valid_replies
        self.max_failed_rounds = max_failed_rounds
        self.max_examples = max_examples
        self.max_update_ratio = max_update_ratio
        self.node_timeout = node_timeout
        self.statistics_layers = statistics_layers
        self.step = ServerStep(server_learning_rate, server_momentum)
        self.roster = Roster()
        self.failed_rounds = 0
        self._round = _Round(0, {})

    # --- what a strategy of one's own overrides -------------------------------------------------

    def client_weights(self, replies: list[ClientReply]) -> Tensor:
        """Weights p (K,), float64: what each model counts; non-negative, sums to 1."""
        raise NotImplementedError

    def sample_clients(self, server_round: int, clients: list[int], size: int) -> list[int]:
        """Which of the connected clients train this round."""
        return random_cohort(clients, size, numpy_generator(self.seed, "sampling", server_round))

    def aggregate(self, replies: list[ClientReply], weights: Tensor) -> State:
        """The fused model, before the server step."""
        return fuse_state_dicts(
            (reply.state for reply in replies), weights, pool_moments=self.pool_moments
        )

    def accepted(self, replies: list[ClientReply], weights: Tensor) -> None:
        """Take note that this round's aggregate became the new model."""

    # --- Flower's interface ---------------------------------------------------------------------

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Sample clients and address the global model to them."""
        self._stopwatch.restart()
        self.report = RoundReport(server_round)
        self._round = _Round(server_round, protocol.state_from_record(arrays))
        if self.fraction_train == 0.0:
            return []
        connected = self._connected(server_round, grid)
        size = max(cohort_size(len(connected), self.fraction_train), self.min_train_nodes)
        cohort = self.sample_clients(server_round, sorted(connected), size)
        messages = self._messages(arrays, config, cohort, connected, MessageType.TRAIN)
        self.report.num_sampled = len(cohort)
        self._stopwatch.lap(self.report, "sample")
        return messages

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Check the replies, fuse the good ones and take the server step."""
        replies = list(replies)
        self._stopwatch.lap(self.report, "train")
        if self.fraction_train == 0.0:
            return None, None
        good, bad = self._judge(with_model=True).judge(replies, with_model=True)
        book_replies(self.report, good, bad)
        if len(good) < self.min_valid_replies:
            why = f"{len(good)} valid replies, min-valid-replies is {self.min_valid_replies}"
            return self._keep_old_model(why, good)
        with one_thread():
            weights = cap_weights(self.client_weights(good), self.max_client_weight)
        self._stopwatch.lap(self.report, "infer")
        aggregate = self.aggregate(good, weights)
        problem = implausible(self._round.sent, aggregate, self.max_update_ratio)
        if problem:
            return self._keep_old_model(f"of the fused model, {problem}", good)
        self.failed_rounds = 0
        model = self.step(self._round.sent, aggregate)
        self.average.update(model)
        self.accepted(good, weights)
        self.report.clients = [
            reply.row(weight, self.assignment_of(reply))
            for reply, weight in zip(good, weights.tolist(), strict=True)
        ] + self.report.clients
        entropy = -torch.xlogy(weights, weights).sum()
        self.report.metrics["weight-entropy"] = float(entropy)
        split_train_time(self.report, good)
        self._stopwatch.lap(self.report, "aggregate")
        means = mean_metrics(good, self.train_metrics_aggr_fn)
        # What the round itself counted is not a client's to say.
        self.report.metrics = {**means, **self.report.metrics}
        return protocol.record_from_state(model), MetricRecord(dict(self.report.metrics))

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Address the served model to a seeded sample of clients for local evaluation."""
        if self.fraction_evaluate == 0.0:
            return []
        served = protocol.record_from_state(self.average.state) if self.average.state else arrays
        connected = self._connected(server_round, grid)
        size = max(cohort_size(len(connected), self.fraction_evaluate), self.min_evaluate_nodes)
        generator = numpy_generator(self.seed, "evaluation-sampling", server_round)
        cohort = random_cohort(sorted(connected), size, generator)
        return self._messages(served, config, cohort, connected, MessageType.EVALUATE)

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        """Example-weighted means of the clients' finite evaluation metrics."""
        if self.fraction_evaluate == 0.0 or not self._round.sampled:
            return None
        good, bad = self._judge(with_model=False).judge(replies, with_model=False)
        self.report.metrics["evaluate-replies-dropped"] = float(len(bad))
        log_dropped(server_round, "evaluation", bad)
        means = mean_metrics(good, self.evaluate_metrics_aggr_fn)
        self.report.metrics = {**means, **self.report.metrics}
        self._stopwatch.lap(self.report, "evaluate")
        return MetricRecord(dict(means)) if means else None

    def summary(self) -> None:
        """Log the strategy's settings at the start of a run."""
        log(
            INFO,
            "\t├──> Server step: learning rate %g, momentum %g",
            self.step.learning_rate,
            self.step.momentum,
        )
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
        super().summary()

    def check_outcome(self, num_rounds: int) -> None:
        """Refuse to call a run a success in which no round was."""
        if self.failed_rounds >= num_rounds and self.fraction_train > 0:
            raise RunStopped(f"none of {num_rounds} rounds had enough valid replies; {_WHERE}")

    # --- for subclasses and the report ----------------------------------------------------------

    @property
    def current(self) -> State:
        """The global model that this round's clients received. Do not write to it."""
        return self._round.sent

    @property
    def server_round(self) -> int:
        """The round in progress."""
        return self._round.number

    def num_channels(self) -> int | None:
        """Length of a ``normalization`` vector, where the model's BatchNorm layers tell it."""
        prefixes = select_layers(batchnorm_prefixes(self.current), self.statistics_layers)
        return sum(self.current[f"{p}running_mean"].numel() for p in prefixes) or None

    def assignment_of(self, reply: ClientReply) -> list[float] | None:
        """The client's row of b for the report, where the strategy has one."""
        return None

    # --- plumbing -------------------------------------------------------------------------------

    def _connected(self, server_round: int, grid: Grid) -> dict[int, int]:
        if server_round == 1:
            expected = max(self.min_available_nodes, self.min_train_nodes)
            return self.roster.wait_for(grid, expected, self.node_timeout)
        return self.roster.connected(grid)

    def _messages(
        self,
        arrays: ArrayRecord,
        config: ConfigRecord,
        cohort: list[int],
        connected: dict[int, int],
        message_type: str,
    ) -> list[Message]:
        # A copy: the caller's config is not ours to change.
        settings = ConfigRecord({**config, protocol.SERVER_ROUND: self._round.number})
        record = RecordDict({self.arrayrecord_key: arrays, self.configrecord_key: settings})
        self._round.sampled = {connected[client]: client for client in cohort}
        return [Message(record, node, message_type) for node in self._round.sampled]

    def _judge(self, *, with_model: bool) -> ReplyJudge:
        sent = self._round.sent if with_model else {}
        return ReplyJudge(
            self._round.number,
            self._round.sampled,
            sent,
            num_channels=self.num_channels(),
            arrays_key=self.arrayrecord_key,
            examples_key=self.weighted_by_key,
            max_examples=self.max_examples,
            max_update_ratio=self.max_update_ratio,
        )

    def _keep_old_model(
        self, why: str, good: list[ClientReply]
    ) -> tuple[ArrayRecord, MetricRecord]:
        self.failed_rounds += 1
        self.report.clients = [reply.row() for reply in good] + self.report.clients
        self.report.metrics["round-failed"] = 1.0
        log(WARNING, "round %d keeps the old model: %s", self._round.number, why)
        if self.failed_rounds >= self.max_failed_rounds:
            # Flower's loop ends here, so nobody else would hand this round to the callbacks.
            self.report_round()
            raise RunStopped(
                f"stopped after {self.failed_rounds} failed rounds in a row, the last because of: "
                f"{why}; {_WHERE}"
            )
        return protocol.record_from_state(self._round.sent), MetricRecord(dict(self.report.metrics))
