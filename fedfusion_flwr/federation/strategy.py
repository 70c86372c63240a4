# SPDX-License-Identifier: Apache-2.0
"""The engine: a Flower strategy that does everything in a federation except the algorithm.

To write a strategy, derive from `FederatedStrategy`, declare its settings as dataclass fields and
its state as a dataclass, and override `advance` and any other hooks it needs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from logging import INFO
from typing import Any, ClassVar

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.common.logger import log
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy
from torch import Tensor, nn

from fedfusion_flwr import protocol
from fedfusion_flwr.config import LayerChoice, RunConfig
from fedfusion_flwr.config_rules import check_arguments, choice
from fedfusion_flwr.errors import ArgumentError
from fedfusion_flwr.federation.bookkeeping import MetricsMean
from fedfusion_flwr.federation.bounds import UpdateBound
from fedfusion_flwr.federation.conversation import Exchange, RoundInProgress, Setting
from fedfusion_flwr.federation.defence import Defence
from fedfusion_flwr.federation.loop import EvaluateFn, Progress, run_rounds
from fedfusion_flwr.federation.options import (
    Participation,
    Plausibility,
    ServerUpdate,
    Serving,
)
from fedfusion_flwr.federation.replies import ClientReply, weights_by_examples
from fedfusion_flwr.federation.round import KeepOldModel, RoundCallback, State, Update
from fedfusion_flwr.federation.sampling import random_cohort
from fedfusion_flwr.fusion import cap_weights, fuse_state_dicts
from fedfusion_flwr.fusion.statistics import batchnorm_prefixes, select_layers
from fedfusion_flwr.fusion.threads import one_thread
from fedfusion_flwr.randomness import numpy_generator


@dataclass
class NoState:
    """The state of an algorithm that carries nothing from round to round."""


@dataclass(kw_only=True, eq=False, repr=False)
class FederatedStrategy(Strategy):
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
    weighted_by_key, arrayrecord_key, configrecord_key : str
        Names of the example count and of the records, as in Flower's FedAvg.
    train_metrics_aggr_fn, evaluate_metrics_aggr_fn : Callable or None
        Average the clients' metrics, as in Flower's FedAvg; weighted by examples by default.
    seed : int
        Seeds sampling and everything else that the server draws.
    statistics_layers : {"all", "ends"}
        Which normalization layers' statistics the clients report.
    defence : Defence or None
        Limits on well-formed replies; None sets none.
    callbacks : Sequence[RoundCallback]
        Called with every round's report; one that raises `StopRun` ends the run.

    Raises
    ------
    ArgumentError
        A ValueError of one sentence: the argument, its value and what is allowed.
    """

    name: ClassVar[str] = ""
    """Its value of the run-config key ``strategy``."""
    single_model: ClassVar[bool] = True
    """Whether `ServerUpdate` and a moving average have a model to act on."""
    server_step: ClassVar[bool] = False
    """Whether a run config's server step and average apply; published forms have neither."""
    own_label_calibration: ClassVar[float] = 0.0
    """tau of the clients' loss where a run config leaves it to the strategy; 0 as published."""

    fraction_train: float = Participation.fraction_train
    fraction_evaluate: float = Participation.fraction_evaluate
    min_train_nodes: int = Participation.min_train_nodes
    min_evaluate_nodes: int = Participation.min_evaluate_nodes
    min_available_nodes: int = Participation.min_available_nodes
    node_timeout: float = Participation.node_timeout
    evaluate_every: int = Participation.evaluate_every
    central_evaluate_every: int = Participation.central_evaluate_every
    min_valid_replies: int = Plausibility.min_valid_replies
    max_failed_rounds: int = Plausibility.max_failed_rounds
    max_examples: int = Plausibility.max_examples
    max_update_ratio: float = Plausibility.max_update_ratio
    server_learning_rate: float = ServerUpdate.server_learning_rate
    server_momentum: float = ServerUpdate.server_momentum
    max_client_weight: float = ServerUpdate.max_client_weight
    average_decay: float = Serving.average_decay
    pool_moments: bool = Serving.pool_moments
    weighted_by_key: str = "num-examples"
    arrayrecord_key: str = "arrays"
    configrecord_key: str = "config"
    train_metrics_aggr_fn: MetricsMean | None = None
    evaluate_metrics_aggr_fn: MetricsMean | None = None
    seed: int = 0
    statistics_layers: LayerChoice = choice(LayerChoice, "all")
    defence: Defence | None = None
    callbacks: Sequence[RoundCallback] = ()

    progress: Progress = field(init=False)
    state: Any = field(init=False)
    """The algorithm's state between rounds: a dataclass, stored in checkpoints."""
    num_rounds: int = field(init=False, default=0)
    timeout: float = field(init=False, default=3600.0)

    def __post_init__(self) -> None:
        check_arguments(type(self).__name__, self)
        Participation.of(self)
        Plausibility.of(self)
        serving, update = Serving.of(self), ServerUpdate.of(self)
        if not self.single_model and update != ServerUpdate():
            raise ArgumentError(
                f"{type(self).__name__} has no single global model to step: leave out "
                "server_learning_rate, server_momentum and max_client_weight"
            )
        self.callbacks = list(self.callbacks)
        self.progress = Progress.start(serving, update)
        self.round = RoundInProgress(self, 0, {}, ArrayRecord())
        self.state = self.initial()

    # --- what an algorithm overrides, in the order of a round -----------------------------------

    def initial(self) -> Any:
        """The algorithm's state before the first round, a dataclass."""
        return NoState()

    @classmethod
    def check_model(cls, config: RunConfig, model: nn.Module, examples: Tensor) -> None:
        """Raise `ModelError`, before anything runs, if the model lacks what the strategy reads."""

    @classmethod
    def rounds_of_equal_steps(cls, config: RunConfig) -> int:
        """Rounds that take as many gradient steps as FedAvg does in ``num-server-rounds``."""
        return config.num_server_rounds

    def prepare_round(self, clients: list[int], exchange: Exchange) -> None:
        """Called before the cohort is drawn from ``clients``, e.g. for a cold start."""

    def sample_clients(self, server_round: int, clients: list[int], size: int) -> list[int]:
        """Which of the connected clients train this round."""
        return random_cohort(clients, size, numpy_generator(self.seed, "sampling", server_round))

    def prepare_cohort(self, cohort: list[int], exchange: Exchange) -> None:
        """Called after the cohort was drawn, e.g. for a first training of newcomers."""

    def sent_to(self, client: int) -> State:
        """The model a client trains from. Return one object for equal models, to encode it once."""
        return self.current

    def expected_from(self, client: int, metrics: Mapping[str, float]) -> State:
        """The model that the client trained from, against which its reply is checked.

        Raises
        ------
        BadReply
            If the metrics in the reply name no such model.
        """
        return self.round.sent[client]

    def train_settings(self, client: int) -> dict[str, Setting]:
        """Settings sent with the model to be trained; see `fedfusion_flwr.protocol`."""
        return {}

    def check_reply(self, reply: ClientReply) -> None:
        """Raise `BadReply` to refuse a train reply that passed all other checks."""

    def advance(self, replies: list[ClientReply]) -> Update:
        """The next global model, from this round's good replies, sorted by client.

        Raises
        ------
        KeepOldModel
            If the replies must not change the model.
        """
        raise NotImplementedError

    def evaluates(self, server_round: int) -> bool:
        """Whether clients evaluate in this round."""
        due = server_round % self.evaluate_every == 0 or server_round == self.num_rounds
        return self.fraction_evaluate > 0 and due

    def prepare_evaluation(self) -> None:
        """Called before clients are sent the models to evaluate."""

    def evaluate_settings(self, client: int) -> dict[str, Setting]:
        """Settings sent with the model to be evaluated."""
        return {}

    def personal_model(self, client: int) -> State:
        """The model that serves a client, chosen by training data only; the client evaluates it."""
        return self.served

    def models(self) -> dict[str, State]:
        """Models kept besides the global one, by short name; they are saved with the run."""
        return {}

    def settings(self) -> Iterable[str]:
        """Lines about the algorithm's own settings, for the log."""
        return ()

    # --- what hooks may use ---------------------------------------------------------------------

    @property
    def current(self) -> State:
        """The global model at the start of this round. Do not write to it."""
        return self.round.model

    @property
    def served(self) -> State:
        """The global model that is evaluated and saved. Do not write to it."""
        return self.progress.average.state or self.current

    @property
    def server_round(self) -> int:
        """The round in progress."""
        return self.round.server_round

    def num_channels(self) -> int | None:
        """Length of a ``normalization`` vector, if the model has BatchNorm layers."""
        return self.channels_of(self.current)

    def channels_of(self, state: State) -> int | None:
        """Total number of channels in a model's reported BatchNorm layers; None without any."""
        prefixes = select_layers(batchnorm_prefixes(state), self.statistics_layers)
        return sum(state[f"{p}running_mean"].numel() for p in prefixes) or None

    def fuse(self, states: Iterable[Mapping[str, Tensor]], weights: Tensor) -> State:
        """The weighted mean; ``pool_moments`` decides how running statistics are fused."""
        return fuse_state_dicts(states, weights, pool_moments=self.pool_moments)

    def fuse_replies(self, replies: Sequence[ClientReply]) -> State:
        """Example-weighted mean of the replies' models."""
        return self.fuse((reply.state for reply in replies), weights_by_examples(replies))

    def objection(self, model: State, current: State) -> str | None:
        """Why a model must not replace the current one; None if it may."""
        return UpdateBound(current, self.max_update_ratio).objection(model)

    def plausible(self, model: State) -> State:
        """The fused model, if it may replace the global one; raises `KeepOldModel` if not."""
        problem = self.objection(model, self.current)
        if problem:
            raise KeepOldModel(f"the fused model is implausible: {problem}")
        return model

    def weighted_update(
        self,
        replies: Sequence[ClientReply],
        weights: Tensor,
        *,
        stand_ins: Sequence[tuple[State, float]] = (),
        assignments: Mapping[int, list[float]] | None = None,
    ) -> Update:
        """Cap the weights, fuse, check, and take the server step: w <- step(w, sum_k p_k w_k).

        Parameters
        ----------
        replies : Sequence[ClientReply]
            K replies of this round.
        weights : Tensor
            p, shape (K,), float64, non-negative, sums to 1.
        stand_ins : Sequence[tuple[State, float]]
            Models in addition to the clients', and their shares of the total weight.
        assignments : Mapping[int, list[float]] or None
            Each client's row of b, for the report.

        Raises
        ------
        KeepOldModel
            If the fused model is implausible.
        """
        limit = self.max_client_weight
        with one_thread():
            capped = cap_weights(weights, limit)
        share = torch.tensor([share for _, share in stand_ins], dtype=torch.float64)
        states = [*(reply.state for reply in replies), *(state for state, _ in stand_ins)]
        fused = self.fuse(states, torch.cat([capped * (1 - share.sum()), share]))
        model = self.progress.step(self.current, self.plausible(fused))
        metrics = {"weight-entropy": float(-torch.xlogy(capped, capped).sum())}
        for reply, weight in zip(replies, weights.tolist(), strict=True):
            if weight > limit:
                metrics["weights-capped"] = metrics.get("weights-capped", 0) + 1
                log(
                    INFO,
                    "round %d: client %d (node %d): weight %.3g capped to %g",
                    *(self.server_round, reply.client, reply.node, weight, limit),
                )
        rows = [
            reply.row(weight, (assignments or {}).get(reply.client))
            for reply, weight in zip(replies, capped.tolist(), strict=True)
        ]
        return Update(model, rows, metrics)

    # --- Flower's interface ---------------------------------------------------------------------

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
        train = train_config or ConfigRecord()
        evaluate = evaluate_config or ConfigRecord()
        return run_rounds(self, grid, initial_arrays, train, evaluate, evaluate_fn)

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Sample clients and make their train messages."""
        model = protocol.state_from_record(arrays)
        self.round = RoundInProgress(self, server_round, model, arrays)
        return self.round.configure_train(config, grid)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Check the replies and let the algorithm make the next model from the good ones."""
        return self.round.aggregate_train(replies)

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Make evaluate messages to a seeded sample of clients, each with the model it gets."""
        return self.round.configure_evaluate(config, grid)

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        """Example-weighted means of the clients' finite evaluation metrics."""
        return self.round.aggregate_evaluate(replies)

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
