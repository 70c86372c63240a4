# SPDX-License-Identifier: Apache-2.0
"""Hostile and careless clients: the real client app, whose replies some clients alter.

Their replies are well formed: where a check could tell a forgery by its round, its sender or its
shapes, the forger has put that right.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection
from unittest import mock

import numpy as np
import torch
from flwr.app import Context, Message, MessageType
from torch import Tensor

from fedfusion_flwr import protocol
from fedfusion_flwr.app import local_work
from fedfusion_flwr.config import RunConfig
from fedfusion_flwr.data import LocalData, data_for, local_data, partition_for
from fedfusion_flwr.federation.round import State
from fedfusion_flwr.fusion import NormalizationStatistics
from fedfusion_flwr.fusion.server_step import is_parameter
from fedfusion_flwr.fusion.statistics import batchnorm_prefixes
from fedfusion_flwr.randomness import numpy_generator

ClientFn = Callable[[Message, Context], Message]

SCALE = 10.0
"""By what a scaled update is longer than the trained one."""
HUGE = 1e6
FAR = 50.0
"""Standard deviations by which far outliers shift their running means."""
INFLATED = 1_000_000
"""Example count that is reported instead of the true one."""


class Attack:
    """Answers train messages in a hostile client's name; the base answers honestly."""

    def answer(self, app: ClientFn, message: Message, context: Context) -> Message:
        """The reply, made with the help of the real client app."""
        received = protocol.state_from_record(message.content.array_records[protocol.ARRAYS])
        reply = self.train(app, message, context)
        trained = protocol.state_from_record(reply.content.array_records[protocol.ARRAYS])
        reply.content[protocol.ARRAYS] = protocol.record_from_state(self.alter(received, trained))
        return reply

    def train(self, app: ClientFn, message: Message, context: Context) -> Message:
        """The reply before it is altered."""
        return app(message, context)

    def alter(self, received: State, trained: State) -> State:
        """What is sent in place of the trained model."""
        return trained


class NotANumber(Attack):
    """Every parameter is NaN."""

    def alter(self, received: State, trained: State) -> State:
        return each_parameter(trained, lambda _, value: torch.full_like(value, torch.nan))


class HugeValues(Attack):
    """Every parameter is huge."""

    def alter(self, received: State, trained: State) -> State:
        return each_parameter(trained, lambda _, value: HUGE * value.sign())


class SignFlip(Attack):
    """The update points backwards."""

    def alter(self, received: State, trained: State) -> State:
        return each_parameter(trained, lambda key, value: 2 * received[key] - value)


class ScaledUpdate(Attack):
    """The update is `SCALE` times as long."""

    def alter(self, received: State, trained: State) -> State:
        return each_parameter(
            trained, lambda key, value: received[key] + SCALE * (value - received[key])
        )


class LabelFlip(Attack):
    """Trains for class C - 1 - y instead of y."""

    def train(self, app: ClientFn, message: Message, context: Context) -> Message:
        def flipped(config: RunConfig, partition_id: int | None) -> LocalData:
            data, last = local_data(config, partition_id), data_for(config).num_classes - 1
            return dataclasses.replace(data, y=last - data.y)

        with mock.patch.object(local_work, "local_data", flipped):
            return app(message, context)


class Replay(Attack):
    """Sends the model of the first round again and again, as if it were new."""

    def __init__(self) -> None:
        self.first: dict[int, State] = {}

    def answer(self, app: ClientFn, message: Message, context: Context) -> Message:
        reply = app(message, context)
        arrays = reply.content.array_records[protocol.ARRAYS]
        first = self.first.setdefault(context.node_id, protocol.state_from_record(arrays))
        reply.content[protocol.ARRAYS] = protocol.record_from_state(first)
        return reply


class InflatedCount(Attack):
    """Honest training of `INFLATED` examples, as it says."""

    def answer(self, app: ClientFn, message: Message, context: Context) -> Message:
        reply = app(message, context)
        reply.content.metric_records[protocol.METRICS][protocol.NUM_EXAMPLES] = INFLATED
        return reply


class OutlierStatistics(Attack):
    """Far running statistics, in the model and in the record for inference."""

    def answer(self, app: ClientFn, message: Message, context: Context) -> Message:
        reply = super().answer(app, message, context)
        if protocol.NORMALIZATION in reply.content:
            state = protocol.state_from_record(reply.content.array_records[protocol.ARRAYS])
            far = NormalizationStatistics.from_state_dict(state)
            reply.content[protocol.NORMALIZATION] = protocol.record_from_statistics(far)
        return reply

    def alter(self, received: State, trained: State) -> State:
        state = dict(trained)
        for prefix in batchnorm_prefixes(trained):
            variance = trained[f"{prefix}running_var"]
            state[f"{prefix}running_mean"] = (
                trained[f"{prefix}running_mean"] + FAR * variance.sqrt()
            )
            state[f"{prefix}running_var"] = FAR**2 * variance
        return state


class Mimicry(Attack):
    """Looks like a client of the dominant component, and sends its update backwards.

    An attacker who knows that client's data: it trains on them and keeps all that the inference
    looks at, running statistics and affine parameters; the other parameters' update is flipped.
    """

    def train(self, app: ClientFn, message: Message, context: Context) -> Message:
        config = RunConfig.from_run_config(context.run_config)
        as_victim = {**context.node_config, "partition-id": dominant_client(config)}
        reply = app(message, dataclasses.replace(context, node_config=as_victim))
        own = context.node_config["partition-id"]
        reply.content.config_records[protocol.CLIENT][protocol.PARTITION_ID] = own
        return reply

    def alter(self, received: State, trained: State) -> State:
        seen = tuple(batchnorm_prefixes(trained))
        return each_parameter(
            trained,
            lambda key, value: value if key.startswith(seen) else 2 * received[key] - value,
        )


NONE = "none"
ATTACKS: dict[str, type[Attack]] = {
    NONE: Attack,
    "nan": NotANumber,
    "huge": HugeValues,
    "sign-flip": SignFlip,
    "scaled": ScaledUpdate,
    "label-flip": LabelFlip,
    "replay": Replay,
    "inflated-count": InflatedCount,
    "outlier-statistics": OutlierStatistics,
    "mimicry": Mimicry,
}


class AttackedClients:
    """A client app in which some partitions attack in every training.

    Parameters
    ----------
    client_app : ClientApp or callable
        The real one.
    attack : str
        A key of `ATTACKS`.
    hostile : Collection[int]
        Partition ids of the attackers.
    records : bool
        False leaves out the normalization records, which stock Flower strategies refuse.
    """

    def __init__(
        self, client_app: ClientFn, attack: str, hostile: Collection[int], *, records: bool = True
    ) -> None:
        self.client_app = client_app
        self.attack = ATTACKS[attack]()
        self.hostile = hostile
        self.records = records

    def __call__(self, message: Message, context: Context) -> Message:
        attacks = context.node_config["partition-id"] in self.hostile
        if attacks and message.metadata.message_type == MessageType.TRAIN:
            reply = self.attack.answer(self.client_app, message, context)
        else:
            reply = self.client_app(message, context)
        if not self.records and reply.has_content():
            reply.content.pop(protocol.NORMALIZATION, None)
        return reply


def each_parameter(state: State, edit: Callable[[str, Tensor], Tensor]) -> State:
    """The state with every parameter edited; buffers stay."""
    return {
        key: edit(key, value) if is_parameter(key, value) else value for key, value in state.items()
    }


def choose_hostile(num_clients: int, share: float, seed: int) -> list[int]:
    """Partition ids of the attackers; more of them contain the fewer."""
    order = numpy_generator(seed, "hostile").permutation(num_clients)
    return sorted(order[: round(share * num_clients)].tolist())


def dominant_client(config: RunConfig) -> int:
    """A client of the largest planted component, or else the one with most examples."""
    cut = partition_for(config)
    if cut.main_components is None:
        return int(np.argmax([len(part) for part in cut.indices]))
    return int(np.argmax(cut.main_components == np.bincount(cut.main_components).argmax()))
