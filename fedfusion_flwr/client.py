# SPDX-License-Identifier: Apache-2.0
"""What a client does with a message: train, evaluate, or answer a probe query.

Data and model are built once per process and reused over rounds and clients; a reply depends only
on the message, the run config and the partition id.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, cast

import torch
from flwr.app import ConfigRecord, Context, Error, Message, MetricRecord, RecordDict
from flwr.common.constant import ErrorCode
from torch import nn

from fedfusion_flwr import protocol
from fedfusion_flwr.config import ConfigError, RunConfig
from fedfusion_flwr.data import LocalData, data_for, local_data, on_device
from fedfusion_flwr.errors import FedFusionError
from fedfusion_flwr.fusion import NormalizationStatistics, StatisticsError
from fedfusion_flwr.models import model_for
from fedfusion_flwr.models.resize import fit_to_state
from fedfusion_flwr.randomness import torch_generator
from fedfusion_flwr.rounds import State
from fedfusion_flwr.training import (
    EVALUATION_BATCH,
    choose_device,
    evaluate,
    least_loss,
    place_model,
    train,
)


@dataclass(frozen=True)
class _Work:
    """A message made ready: config, partition, data and the received models, the first loaded."""

    config: RunConfig
    partition_id: int
    settings: ConfigRecord
    received: list[State]
    model: nn.Module
    data: LocalData

    @property
    def server_round(self) -> int:
        return int(cast(int, self.settings[protocol.SERVER_ROUND]))

    def setting(self, key: str, otherwise: float) -> float:
        """What the strategy says, or else the run config."""
        return float(cast(float, self.settings.get(key, otherwise)))

    def choose(self) -> dict[str, int]:
        """Of several received models load the one of least training loss (IFCA); report it."""
        if protocol.NUM_MODELS not in self.settings:
            return {}
        chosen = least_loss(self.model, self.received, self.data.x, self.data.y)
        examples = len(self.received) * len(self.data.x)
        return {protocol.CLUSTER: chosen, protocol.FORWARD_EXAMPLES: examples}


def handle_train(message: Message, context: Context) -> Message:
    """Train on local data; reply with state dict, normalization record and metrics."""
    return _answer(message, context, _train)


def handle_evaluate(message: Message, context: Context) -> Message:
    """Reply with the received model's loss and accuracy on the client's held-out part."""
    return _answer(message, context, _evaluate)


def handle_query(message: Message, context: Context) -> Message:
    """Reply with the moments of the client's data under the received model, without training."""
    return _answer(message, context, _query)


def _train(work: _Work) -> RecordDict:
    config, data = work.config, work.data
    if not len(data.x):
        raise FedFusionError("this client has no training examples; give it data or leave it out")
    started, clock = time.time(), time.perf_counter()
    reported: dict[str, float] = {protocol.NUM_EXAMPLES: len(data.x), **work.choose()}
    probed = None
    if config.statistics_source == "probe":
        probed = _probe(work)
        looked = reported.get(protocol.FORWARD_EXAMPLES, 0)
        reported[protocol.FORWARD_EXAMPLES] = looked + len(data.x)
    has_validation = len(data.x_validation) > 0
    x_check = data.x_validation if has_validation else data.x
    y_check = data.y_validation if has_validation else data.y
    reported["loss-before"], _ = evaluate(work.model, x_check, y_check)
    phase = str(work.settings.get(protocol.PHASE, "training"))
    result = train(
        work.model,
        data.x,
        data.y,
        epochs=int(work.setting(protocol.LOCAL_EPOCHS, config.local_epochs)),
        batch_size=config.batch_size,
        learning_rate=work.setting(protocol.LEARNING_RATE, config.learning_rate),
        momentum=config.momentum,
        weight_decay=config.weight_decay,
        generator=torch_generator(config.seed, phase, work.server_round, work.partition_id),
        fused_normalization=config.local_normalization == "fused"
        and work.server_round >= config.fused_from_round,
        proximal_mu=work.setting(protocol.PROXIMAL_MU, 0),
        max_steps=int(work.setting(protocol.MAX_STEPS, 0)) or None,
        frozen=set(cast(list[str], work.settings.get(protocol.FROZEN, []))),
    )
    reported[protocol.TRAIN_LOSS], reported[protocol.GRADIENT_STEPS] = result
    reported["loss-after"], _ = evaluate(work.model, x_check, y_check)
    state = work.model.state_dict()
    content = RecordDict({protocol.ARRAYS: protocol.record_from_state(state)})
    try:
        statistics = probed or NormalizationStatistics.from_state_dict(
            state, layers=_layers(config)
        )
        content[protocol.NORMALIZATION] = protocol.record_from_statistics(statistics)
    except StatisticsError:
        pass  # no running statistics: only a strategy that needs them may object
    reported[protocol.TRAIN_STARTED] = started
    reported[protocol.TRAIN_SECONDS] = time.perf_counter() - clock
    metrics = MetricRecord(dict(reported))
    if work.settings.get(protocol.CLASS_COUNTS, False):
        counts = torch.bincount(data.y, minlength=data_for(config).num_classes)
        metrics[protocol.CLASS_COUNTS] = counts.tolist()
    content[protocol.METRICS] = metrics
    return content


def _evaluate(work: _Work) -> RecordDict:
    if not len(work.data.x_validation):
        raise FedFusionError("this client has no validation examples; raise validation-fraction")
    reported: dict[str, float] = {protocol.NUM_EXAMPLES: len(work.data.x_validation)}
    reported |= work.choose()
    loss, accuracy = evaluate(work.model, work.data.x_validation, work.data.y_validation)
    reported |= {"personalized-loss": loss, "personalized-accuracy": accuracy}
    return RecordDict({protocol.METRICS: MetricRecord(dict(reported))})


def _query(work: _Work) -> RecordDict:
    return RecordDict(
        {
            protocol.NORMALIZATION: protocol.record_from_statistics(_probe(work)),
            protocol.METRICS: MetricRecord({protocol.NUM_EXAMPLES: len(work.data.x)}),
        }
    )


def _probe(work: _Work) -> NormalizationStatistics:
    if not len(work.data.x):
        raise FedFusionError("this client has no examples to probe; give it data or leave it out")
    return NormalizationStatistics.probe(
        work.model, torch.split(work.data.x, EVALUATION_BATCH), layers=_layers(work.config)
    )


def _layers(config: RunConfig) -> Literal["all", "ends"]:
    return cast(Literal["all", "ends"], config.statistics_layers)


def _answer(message: Message, context: Context, work: Callable[[_Work], RecordDict]) -> Message:
    """Run one handler; what a user can act on becomes an error reply of one sentence."""
    try:
        ready = _prepare(message, context)
        content = work(ready)
    except (FedFusionError, StatisticsError) as problem:
        return Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, str(problem)), reply_to=message)
    content[protocol.CLIENT] = ConfigRecord(
        {protocol.SERVER_ROUND: ready.server_round, protocol.PARTITION_ID: ready.partition_id}
    )
    return Message(content, reply_to=message)


def _prepare(message: Message, context: Context) -> _Work:
    config = RunConfig.from_run_config(context.run_config)
    torch.set_num_threads(config.threads_per_client)
    partition_id = _partition_id(context, config)
    device = choose_device(config.device)
    data = on_device(local_data(config, partition_id), device)
    settings = message.content.config_records[protocol.CONFIG]
    state = protocol.state_from_record(message.content.array_records[protocol.ARRAYS])
    packed = protocol.NUM_MODELS in settings
    received = list(protocol.unpack_states(state).values()) if packed else [state]
    model = fit_to_state(_model(config, device.type), received[0])
    model.load_state_dict(received[0])
    return _Work(config, partition_id, settings, received, model, data)


@functools.lru_cache(maxsize=2)
def _model(config: RunConfig, device: str) -> nn.Module:
    """A model to load parameters into; its own are of no account."""
    model = model_for(config, data_for(config), seed=0)
    return place_model(model, torch.device(device))


def _partition_id(context: Context, config: RunConfig) -> int:
    partition_id = context.node_config.get("partition-id")
    if not isinstance(partition_id, int):
        raise ConfigError(
            "this node has no partition-id; start its SuperNode with "
            '--node-config "partition-id=0 num-partitions=10", say'
        )
    partitions = context.node_config.get("num-partitions", config.num_clients)
    if partitions != config.num_clients:
        raise ConfigError(
            f"num-clients = {config.num_clients}, but this federation has {partitions} partitions; "
            "make num-clients and the federation's num-supernodes equal"
        )
    if not 0 <= partition_id < config.num_clients:
        raise ConfigError(
            f"partition-id = {partition_id} is not allowed: from 0 to {config.num_clients - 1}"
        )
    return partition_id
