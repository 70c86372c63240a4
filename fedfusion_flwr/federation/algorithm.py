# SPDX-License-Identifier: Apache-2.0
"""What an algorithm overrides, with the defaults of plain federated training."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from flwr.app import ArrayRecord

from fedfusion_flwr.federation.conversation import Conversation, Setting
from fedfusion_flwr.federation.loop import ReportingFedAvg
from fedfusion_flwr.federation.replies import ClientReply
from fedfusion_flwr.federation.round import State
from fedfusion_flwr.federation.sampling import random_cohort
from fedfusion_flwr.fusion.statistics import LayerChoice, batchnorm_prefixes, select_layers
from fedfusion_flwr.randomness import numpy_generator

Exchange = Callable[[Sequence[int], State, Mapping[str, Setting]], list[ClientReply]]
"""Have clients train a model outside the round's own training; returns the good replies."""


class KeepOldModel(Exception):
    """Why a round's replies must not change the model; `AlgorithmHooks.advance` may raise it."""


class AlgorithmHooks(ReportingFedAvg):
    """The hooks, in the order in which a round calls them, and what they may look at.

    Parameters
    ----------
    seed : int
        Seed of client sampling.
    statistics_layers : {"all", "ends"}
        Which normalization layers' statistics the clients report.
    **reporting
        Arguments of `ReportingFedAvg`.
    """

    def __init__(
        self, *, seed: int = 0, statistics_layers: LayerChoice = "all", **reporting: Any
    ) -> None:
        super().__init__(**reporting)
        self.seed = seed
        self.statistics_layers = statistics_layers
        self._round = Conversation(0, {}, ArrayRecord())

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

    def expected_from(self, client: int, metrics: Mapping[str, float]) -> State:
        """The model that the client trained from, by which its reply's is judged.

        Raises
        ------
        BadReply
            If what the reply says in its metrics points to none.
        """
        return self._round.sent[client]

    def train_settings(self, client: int) -> dict[str, Setting]:
        """What a train message says beside the model; see `fedfusion_flwr.protocol`."""
        return {}

    def check_reply(self, reply: ClientReply) -> None:
        """Refuse a train reply, good in all else, by raising `BadReply`."""

    def advance(self, replies: list[ClientReply]) -> State:
        """The next global model, from this round's good replies, sorted by client.

        Also notes in ``self.report`` what each client counted (see `SingleModelStrategy`).

        Raises
        ------
        KeepOldModel
            If the replies must not change the model.
        """
        raise NotImplementedError

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

    # --- what hooks may look at -----------------------------------------------------------------

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
        return self.channels_of(self.current)

    def channels_of(self, state: State) -> int | None:
        """How many channels the reported BatchNorm layers of a model have in all."""
        prefixes = select_layers(batchnorm_prefixes(state), self.statistics_layers)
        return sum(state[f"{p}running_mean"].numel() for p in prefixes) or None
