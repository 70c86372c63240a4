# SPDX-License-Identifier: Apache-2.0
"""FedMA (Wang, Yurochkin, Sun, Papailiopoulos and Khazaeni, ICLR 2020, "Federated learning with
matched averaging").

One pass over a network of N layers, with J clients:
  every client trains a network of its own: at first a differently initialized one, in later passes
  its slice of the global network, back at the original widths
  for n = 1..N-1:
    1. match the clients' units of layer n; global unit i <- the mean of its members
    2. every client gets global layers 1..n, and layer n+1 with its inputs moved to the global units
    3. every client trains layers n+1..N, with 1..n frozen
  layer N: the row of class c <- sum_j n_jc w_jc / sum_j n_jc, over n_jc examples of the class

A Flower round is one training, so that a pass is N rounds. The clients of a pass are drawn at its
start; one that fails is left out of the remaining layers. Between passes, the last complete global
model is served. docs/strategies.md lists where this differs from the authors' code.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass, field
from logging import WARNING

import numpy as np
import torch
from flwr.common.logger import log
from torch import Tensor

from fedfusion_flwr import protocol
from fedfusion_flwr.config import MatchingWidth
from fedfusion_flwr.config_rules import above, at_least, checked, choice
from fedfusion_flwr.errors import FedFusionError
from fedfusion_flwr.federation.bookkeeping import Timer
from fedfusion_flwr.federation.replies import BadReply, ClientReply
from fedfusion_flwr.federation.round import Exchange, KeepOldModel, Setting, State, Update
from fedfusion_flwr.federation.strategy import FederatedStrategy
from fedfusion_flwr.fusion.threads import one_thread
from fedfusion_flwr.randomness import numpy_generator
from fedfusion_flwr.strategies.clusters import InitialState
from fedfusion_flwr.strategies.fedma.layers import Layer, PlainNetwork
from fedfusion_flwr.strategies.fedma.matching import Matching, Units, match_units


@dataclass
class FedMAState:
    """The pass in progress and the last complete one.

    Attributes
    ----------
    passes, completed_in : int
        Complete passes, and the round in which the last of them ended.
    matchings : list[Matching]
        Those of the layers that the pass in progress has behind it.
    nets : dict[int, State]
        The network that each client trains for the next layer.
    units_of : dict[int, list[Units]]
        For the last complete pass, each client's units of every hidden layer.
    common_units : list[Units]
        The same for a newcomer.
    """

    passes: int = 0
    completed_in: int = 0
    matchings: list[Matching] = field(default_factory=list)
    nets: dict[int, State] = field(default_factory=dict)
    units_of: dict[int, list[Units]] = field(default_factory=dict)
    common_units: list[Units] = field(default_factory=list)

    @property
    def layer(self) -> int:
        """The layer of the pass in progress that is matched next, counted from 0."""
        return len(self.matchings)


@dataclass(kw_only=True, eq=False, repr=False)
class FedMA(FederatedStrategy):
    """Layer-wise matched averaging; the global model's hidden layers may be wider than a client's.

    Parameters
    ----------
    network : PlainNetwork
        The model's layers; see `fedfusion_flwr.strategies.fedma.network`.
    initial_state : Callable[[int], State] or None
        Makes the untrained network of client k from the number k + 1. None starts every client
        from the initial global model: their units are then already aligned.
    matching_width : {"variable", "fixed"}
        Whether a unit that is like no other may become a new one.
    matching_gamma : float
        The larger, the sooner it does.
    matching_sweeps : int
        How often every client is matched again.

    Models of different widths have no moving average: ``average_decay`` must stay 0.
    """

    name = "fedma"
    single_model = False

    network: PlainNetwork | None = None
    initial_state: InitialState | None = None
    matching_width: MatchingWidth = choice(MatchingWidth, "variable")
    matching_gamma: float = checked(1e-3, above(0))
    matching_sweeps: int = checked(5, at_least(1))
    state: FedMAState = field(init=False)

    def initial(self) -> FedMAState:
        """Before the first pass."""
        if self.network is None:
            raise FedFusionError(
                "FedMA needs to know the model's layers: give it network, made by "
                "fedfusion_flwr.strategies.fedma.network"
            )
        if self.average_decay > 0:
            raise FedFusionError(
                f"FedMA's models differ in width and have no average: average_decay = "
                f"{self.average_decay} must be 0"
            )
        return FedMAState()

    # --- a pass ---------------------------------------------------------------------------------

    def prepare_round(self, clients: list[int], exchange: Exchange) -> None:
        """Refuse a run that ends before its first pass."""
        if self.num_rounds < self._layers.depth:
            raise FedFusionError(
                f"num-server-rounds = {self.num_rounds} ends before FedMA's first pass over the "
                f"model's {self._layers.depth} layers; set it to a multiple of "
                f"{self._layers.depth}"
            )

    def sample_clients(self, server_round: int, clients: list[int], size: int) -> list[int]:
        """The clients of the pass that are connected; with too few of them a new pass begins."""
        members = sorted(self.state.nets.keys() & set(clients))
        if self.state.layer > 0 and len(members) >= max(self.min_valid_replies, 1):
            return members
        cohort = super().sample_clients(server_round, clients, size)
        self.state.matchings = []
        self.state.nets = {client: self._own_net(client) for client in cohort}
        return cohort

    def sent_to(self, client: int) -> State:
        """The matched layers, and the client's own above them."""
        return self.state.nets[client]

    def train_settings(self, client: int) -> dict[str, Setting]:
        """Freeze the matched layers; ask for class counts when the last one is trained."""
        frozen = self._layers.keys_below(self.state.layer, self.state.nets[client])
        settings: dict[str, Setting] = {protocol.FROZEN: frozen} if frozen else {}
        return {**settings, protocol.CLASS_COUNTS: True} if self._is_last else settings

    def check_reply(self, reply: ClientReply) -> None:
        """Refuse invalid class counts."""
        if not self._is_last:
            return
        classes = self._layers.layers[-1].units
        counts = reply.lists.get(protocol.CLASS_COUNTS, [])
        whole = all(count >= 0 and count == int(count) for count in counts)
        if not whole or len(counts) != classes or sum(counts) != reply.num_examples:
            raise BadReply(
                "class-counts",
                f"{protocol.CLASS_COUNTS} = {counts!s:.60} are not {classes} whole numbers that "
                f"sum to {protocol.NUM_EXAMPLES} = {reply.num_examples}",
            )

    def advance(self, replies: list[ClientReply]) -> Update:
        """Match or average one layer; the global model changes only with the last one."""
        state, layer = self.state, self._layers.layers[self.state.layer]
        nets = {reply.client: self._trained(reply) for reply in replies}
        with Timer() as timer, one_thread():
            matching = self._match(layer, nets)
        weights = class_weights(replies) if self._is_last else None
        merged = layer.merge(nets, matching, weights=weights, pool_moments=self.pool_moments)
        if not all(bool(value.isfinite().all()) for value in merged.values()):
            raise KeepOldModel(f"layer {state.layer + 1} of the matched model is not finite")
        update = Update(
            self.current,
            [reply.row(1 / len(replies)) for reply in replies],
            {
                "pass": float(state.passes + 1),
                "layer": float(state.layer + 1),
                "layer-width": float(matching.width),
            },
            seconds={"infer": timer.seconds},
        )
        if self._is_last:
            self._end_pass(list(nets))
            return dataclasses.replace(update, model={**nets[replies[0].client], **merged})
        state.matchings.append(matching)
        state.nets = {
            client: self._layers.widen_inputs(
                {**net, **merged}, state.layer, matching.units[client], matching.width
            )
            for client, net in nets.items()
        }
        return update

    def evaluates(self, server_round: int) -> bool:
        """At the end of a pass, when the global model has changed, and in the last round."""
        ended = self.state.completed_in == server_round > 0
        due = ended and self.state.passes % self.evaluate_every == 0
        return self.fraction_evaluate > 0 and (due or server_round == self.num_rounds)

    @property
    def _is_last(self) -> bool:
        return self.state.layer == self._layers.depth - 1

    def _own_net(self, client: int) -> State:
        """What a client trains first in a pass: a network of the original widths."""
        if self.state.passes > 0:
            units = self.state.units_of.get(client, self.state.common_units)
            return self._layers.take(self.current, units)
        return self.initial_state(client + 1) if self.initial_state else self.current

    def _trained(self, reply: ClientReply) -> State:
        """The client's network, with the matched layers as sent: clients may not change them."""
        sent = self.state.nets[reply.client]
        matched = self._layers.keys_below(self.state.layer, sent)
        return {**reply.state, **{key: sent[key] for key in matched}}

    def _match(self, layer: Layer, nets: dict[int, State]) -> Matching:
        """The layer's units; those of the last one are the classes, which have an order."""
        if self._is_last:
            return Matching(dict.fromkeys(nets, np.arange(layer.units)), layer.units)
        return match_units(
            {client: layer.descriptors(net) for client, net in nets.items()},
            gamma=self.matching_gamma,
            sweeps=self.matching_sweeps,
            generator=numpy_generator(self.seed, "matching", self.server_round),
            grow=self.matching_width == "variable",
        )

    def _end_pass(self, clients: list[int]) -> None:
        state = self.state
        state.units_of = {client: [m.units[client] for m in state.matchings] for client in clients}
        state.common_units = [
            np.argsort(-matching.members, kind="stable")[: layer.units]
            for matching, layer in zip(state.matchings, self._layers.layers[:-1], strict=True)
        ]
        state.passes += 1
        state.completed_in = self.server_round
        state.matchings, state.nets = [], {}

    def num_channels(self) -> int | None:
        """That of the models sent: all clients of a round train one size, which then changes."""
        return self.channels_of(next(iter(self.round.sent.values()), self.current))

    @property
    def _layers(self) -> PlainNetwork:
        assert self.network is not None
        return self.network

    def settings(self) -> Iterable[str]:
        """Passes, widths and starts; warns about rounds after the last whole pass."""
        width = f"variable width, gamma {self.matching_gamma:g}"
        if self.matching_width == "fixed":
            width = "fixed width: a deviation from the paper"
        start = "networks of their own" if self.initial_state else "the initial model"
        depth = self._layers.depth
        yield (
            f"FedMA: passes of {depth} rounds, one a layer; {width}; {self.matching_sweeps} "
            f"sweeps; clients start from {start}"
        )
        rest = self.num_rounds % depth
        if rest:
            log(
                WARNING,
                "the last %d of %d rounds do not complete a pass and leave the model unchanged; "
                "make num-server-rounds a multiple of %d",
                *(rest, self.num_rounds, depth),
            )


def class_weights(replies: list[ClientReply]) -> Tensor:
    """Each client's weight for each class, (J, C): its examples; 1 for a class without any.

    Where a defence has cut a client's example count, its weight is lower in every class.
    """
    counts = torch.tensor([reply.lists[protocol.CLASS_COUNTS] for reply in replies]).double()
    accepted = torch.tensor([reply.num_examples for reply in replies]).double()
    counts = counts * (accepted / counts.sum(1)).unsqueeze(1)
    return torch.where(counts.sum(0) > 0, counts, 1.0)
