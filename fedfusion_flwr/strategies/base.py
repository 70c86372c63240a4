# SPDX-License-Identifier: Apache-2.0
"""What every strategy here shares: seeded sampling, messages, reply checks, costs, reports.

`SingleModelStrategy` and `MultiModelStrategy` stand on it; a strategy of one's own overrides a few
hooks of one of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from logging import INFO, WARNING
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord
from flwr.common.logger import log
from flwr.serverapp import Grid
from flwr.serverapp.exception import AggregationError

from fedfusion_flwr import protocol
from fedfusion_flwr.config import cohort_size
from fedfusion_flwr.errors import FedFusionError
from fedfusion_flwr.fusion.statistics import LayerChoice, batchnorm_prefixes, select_layers
from fedfusion_flwr.randomness import numpy_generator
from fedfusion_flwr.rounds import ClientRow, RoundCallback, RoundReport, State
from fedfusion_flwr.strategies.bookkeeping import (
    add_costs_down,
    add_costs_up,
    book_replies,
    log_dropped,
    mean_metrics,
    split_train_time,
)
from fedfusion_flwr.strategies.conversation import Conversation, Setting
from fedfusion_flwr.strategies.replies import ClientReply, ReplyJudge
from fedfusion_flwr.strategies.reporting import ReportingFedAvg
from fedfusion_flwr.strategies.roster import Roster
from fedfusion_flwr.strategies.sampling import random_cohort

_WHERE = "the reason of every dropped reply is in the log and in clients.jsonl"

Exchange = Callable[[Sequence[int], State, Mapping[str, Setting]], list[ClientReply]]
"""Have clients train a model outside the round's own training; returns the good replies."""


class RunStopped(FedFusionError, AggregationError):
    """Several rounds in a row had too few usable replies; what was written so far stays."""


class KeepOldModel(Exception):
    """Why a round's replies must not change the model; `BaseStrategy.advance` may raise it."""


class BaseStrategy(ReportingFedAvg):
    """Checked replies, seeded sampling, personal evaluation and reports; without an algorithm.

    Parameters
    ----------
    seed : int
        Seed of client sampling.
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
        average_decay: float = 0.0,
        pool_moments: bool = True,
        evaluate_every: int = 1,
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
        self.evaluate_every = evaluate_every
        self.min_valid_replies = min_valid_replies
        self.max_failed_rounds = max_failed_rounds
        self.max_examples = max_examples
        self.max_update_ratio = max_update_ratio
        self.node_timeout = node_timeout
        self.statistics_layers = statistics_layers
        self.roster = Roster()
        self.failed_rounds = 0
        self._round = Conversation(0, {}, ArrayRecord())

    # --- what an algorithm overrides ------------------------------------------------------------

    def advance(self, replies: list[ClientReply]) -> State:
        """The next global model, from this round's good replies, sorted by client.

        Also notes in ``self.report`` what each client counted (`book_clients`).

        Raises
        ------
        KeepOldModel
            If the replies must not change the model.
        """
        raise NotImplementedError

    def prepare_round(self, clients: list[int], exchange: Exchange) -> None:
        """Before the cohort of a round is drawn from ``clients``: e.g. a cold start."""

    def sample_clients(self, server_round: int, clients: list[int], size: int) -> list[int]:
        """Which of the connected clients train this round."""
        return random_cohort(clients, size, numpy_generator(self.seed, "sampling", server_round))

    def prepare_cohort(self, cohort: list[int], exchange: Exchange) -> None:
        """After the cohort of a round was drawn: e.g. a first training of newcomers."""

    def sent_to(self, client: int) -> State:
        """What a client is sent to train from. The same object for equal models, to encode once."""
        return self.current

    def expected_from(self, client: int) -> State:
        """A model with the keys, shapes and types that the client's reply must have."""
        return self._round.sent[client]

    def train_settings(self, client: int) -> dict[str, Setting]:
        """What a train message says beside the model; see `fedfusion_flwr.protocol`."""
        return {}

    def check_reply(self, reply: ClientReply) -> None:
        """Refuse a train reply, good in all else, by raising `BadReply`."""

    def prepare_evaluation(self) -> None:
        """Before clients are sent the models to evaluate."""

    def evaluate_settings(self, client: int) -> dict[str, Setting]:
        """What an evaluate message says beside the model."""
        return {}

    def personal_model(self, client: int) -> State:
        """The model that serves a client, assigned by training data only; evaluated there."""
        return self.served

    def models(self) -> dict[str, State]:
        """The models that are kept beside the global one, by short name, for the artifacts."""
        return {}

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
        super().summary()

    def check_outcome(self, num_rounds: int) -> None:
        """Refuse to call a run a success in which no round was."""
        if self.failed_rounds >= num_rounds and self.fraction_train > 0:
            raise RunStopped(f"none of {num_rounds} rounds had enough valid replies; {_WHERE}")

    # --- for algorithms and the report ----------------------------------------------------------

    @property
    def current(self) -> State:
        """The global model at the start of this round. Do not write to it."""
        return self._round.model

    @property
    def served(self) -> State:
        """The global model that is evaluated and saved. Do not write to it."""
        return self.average.state or self.current

    @property
    def server_round(self) -> int:
        """The round in progress."""
        return self._round.server_round

    def num_channels(self) -> int | None:
        """Length of a ``normalization`` vector, where the model's BatchNorm layers tell it."""
        model = next((self.expected_from(client) for client in self._round.sent), self.current)
        prefixes = select_layers(batchnorm_prefixes(model), self.statistics_layers)
        return sum(model[f"{p}running_mean"].numel() for p in prefixes) or None

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
        self._round.ask({connected[client]: client for client in clients}, lambda _: state)
        messages = self._messages(MessageType.TRAIN, config, lambda _: settings)
        replies = list(grid.send_and_receive(messages, timeout=self.timeout))
        good, bad = self._judge(replies, lambda _: state)
        book_replies(self.report, good, bad)
        return good

    def _judge(
        self,
        replies: Iterable[Message],
        expected: Callable[[int], State] | None,
        check: Callable[[ClientReply], None] = lambda _: None,
    ) -> tuple[list[ClientReply], list[ClientRow]]:
        """Split into good and bad; ``expected`` is the form of a reply's model, if it has one."""
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
