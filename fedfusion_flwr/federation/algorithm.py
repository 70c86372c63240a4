# SPDX-License-Identifier: Apache-2.0
"""The algorithm's side of a strategy: what it may override, and what it may use for that.

`FederatedStrategy` adds the engine. To write a strategy, derive from that, declare its settings as
dataclass fields and its state as a dataclass, and override `advance` and any other hooks it needs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from logging import INFO
from typing import Any, ClassVar

import torch
from flwr.common.logger import log
from torch import Tensor, nn

from fedfusion_flwr.config import LayerChoice, RunConfig
from fedfusion_flwr.config_rules import choice
from fedfusion_flwr.errors import ArgumentError
from fedfusion_flwr.federation.bounds import UpdateBound
from fedfusion_flwr.federation.options import Participation, Plausibility, ServerUpdate, Serving
from fedfusion_flwr.federation.replies import ClientReply, weights_by_examples
from fedfusion_flwr.federation.round import (
    Exchange,
    KeepOldModel,
    Progress,
    RoundInProgress,
    RoundReport,
    Setting,
    State,
    Update,
)
from fedfusion_flwr.federation.sampling import random_cohort
from fedfusion_flwr.fusion import ServedAverage, ServerStep, cap_weights, fuse_state_dicts
from fedfusion_flwr.fusion.statistics import batchnorm_prefixes, select_layers
from fedfusion_flwr.fusion.threads import one_thread
from fedfusion_flwr.randomness import numpy_generator


@dataclass
class NoState:
    """The state of an algorithm that carries nothing from round to round."""


# Bases in this order give the fields in the reverse one.
@dataclass(kw_only=True, eq=False, repr=False)
class Algorithm(Serving, ServerUpdate, Plausibility, Participation):
    """The settings, the hooks in the order of a round, and the tools for them."""

    name: ClassVar[str] = ""
    """Its value of the run-config key ``strategy``."""
    single_model: ClassVar[bool] = True
    """Whether `ServerUpdate` and a moving average have a model to act on."""
    server_step: ClassVar[bool] = False
    """Whether it steps with momentum and serves an average unless the run config says otherwise."""
    own_label_calibration: ClassVar[float] = 0.0
    """tau of the clients' loss where a run config leaves it to the strategy; 0 as published."""

    seed: int = 0
    statistics_layers: LayerChoice = choice(LayerChoice, "all")

    progress: Progress = field(init=False)
    state: Any = field(init=False)
    """The algorithm's state between rounds: a dataclass, stored in checkpoints."""
    num_rounds: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        update = [item for item in fields(ServerUpdate) if getattr(self, item.name) != item.default]
        if update and not self.single_model:
            raise ArgumentError(
                f"{type(self).__name__} has no single global model to step: leave out "
                "server_learning_rate, server_momentum and max_client_weight"
            )
        step = ServerStep(self.server_learning_rate, self.server_momentum)
        self.progress = Progress(ServedAverage(self.average_decay), step)
        self.round = RoundInProgress(RoundReport(0))
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
        return self.round.report.server_round

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
