# SPDX-License-Identifier: Apache-2.0
"""What a client does with a message: train, evaluate, or answer a probe query.

A reply depends only on the message, the run config and the node config.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Error, Message, MetricRecord, RecordDict
from flwr.common.constant import ErrorCode

from fedfusion_flwr import protocol
from fedfusion_flwr.app.local_work import LocalWork
from fedfusion_flwr.app.training import EVALUATION_BATCH, evaluate_with_prior
from fedfusion_flwr.config import ConfigError, RunConfig
from fedfusion_flwr.data import data_for, signature_difference
from fedfusion_flwr.errors import FedFusionError
from fedfusion_flwr.fusion import NormalizationStatistics, StatisticsError
from fedfusion_flwr.randomness import torch_generator


def handle_train(message: Message, context: Context) -> Message:
    """Train on local data; reply with state dict, normalization record and metrics."""
    return _answer(message, context, _train)


def handle_evaluate(message: Message, context: Context) -> Message:
    """Reply with loss and accuracies on the held-out part, after ``finetune-steps`` if any."""
    return _answer(message, context, _evaluate)


def handle_query(message: Message, context: Context) -> Message:
    """Reply with the moments of the client's data under the received model, without training."""
    return _answer(message, context, _query)


def _train(work: LocalWork) -> RecordDict:
    config, data = work.config, work.data
    if not len(data.x):
        raise FedFusionError("this client has no training examples; give it data or leave it out")
    started, clock = time.time(), time.perf_counter()
    reported: dict[str, float] = {protocol.NUM_EXAMPLES: len(data.x), **work.choose()}
    normalization: dict[str, ArrayRecord] = {}
    if config.statistics_source == "probe":
        normalization = _normalization(_probe, work)
        looked = reported.get(protocol.FORWARD_EXAMPLES, 0)
        reported[protocol.FORWARD_EXAMPLES] = looked + len(data.x)
    phase = str(work.settings.get(protocol.PHASE, protocol.TRAINING))
    epochs = work.setting(protocol.LOCAL_EPOCHS, config.local_epochs)
    own_steps = 0 if protocol.LOCAL_EPOCHS in work.settings else config.local_steps
    steps = int(work.setting(protocol.MAX_STEPS, own_steps)) or None
    result = work.fit(phase, epochs=int(epochs), steps=steps)
    reported[protocol.TRAIN_LOSS], reported[protocol.GRADIENT_STEPS] = result
    if config.statistics_source == "local":
        normalization = _normalization(_trained_statistics, work)
    reported[protocol.TRAIN_STARTED] = started
    reported[protocol.TRAIN_SECONDS] = time.perf_counter() - clock
    content = RecordDict(
        {protocol.ARRAYS: protocol.record_from_state(work.model.state_dict()), **normalization}
    )
    metrics = MetricRecord(dict(reported))
    if work.settings.get(protocol.CLASS_COUNTS, False):
        metrics[protocol.CLASS_COUNTS] = work.label_counts.tolist()
    content[protocol.METRICS] = metrics
    return content


def _evaluate(work: LocalWork) -> RecordDict:
    if not len(work.data.x_validation):
        raise FedFusionError("this client has no validation examples; raise validation-fraction")
    reported: dict[str, float] = {protocol.NUM_EXAMPLES: len(work.data.x_validation)}
    reported |= work.choose()
    work.normalize_for_evaluation()
    if work.config.finetune_steps:
        work.fit("finetune", steps=work.config.finetune_steps, augmentation="finetune-augmentation")
    found = evaluate_with_prior(
        work.model,
        work.data.x_validation,
        work.data.y_validation,
        work.log_prior,
        work.config.precision,
    )
    reported |= {
        "personalized-loss": found.loss,
        "personalized-accuracy": found.accuracy,
        "personalized-prior-accuracy": found.prior_accuracy,
    }
    return RecordDict({protocol.METRICS: MetricRecord(dict(reported))})


def _query(work: LocalWork) -> RecordDict:
    return RecordDict(
        {
            protocol.NORMALIZATION: protocol.record_from_statistics(_blurred(_probe(work), work)),
            protocol.METRICS: MetricRecord({protocol.NUM_EXAMPLES: len(work.data.x)}),
        }
    )


def _normalization(
    read: Callable[[LocalWork], NormalizationStatistics], work: LocalWork
) -> dict[str, ArrayRecord]:
    """The normalization record, or nothing if the model has no such statistics.

    A strategy that needs them has refused the model at the start of the run.
    """
    try:
        statistics = _blurred(read(work), work)
        return {protocol.NORMALIZATION: protocol.record_from_statistics(statistics)}
    except StatisticsError:
        return {}


def _blurred(statistics: NormalizationStatistics, work: LocalWork) -> NormalizationStatistics:
    """Add ``statistics-noise``; the model sent with it still has exact running statistics."""
    if not work.config.statistics_noise:
        return statistics
    keys = work.server_round, work.key
    generator = torch_generator(work.config.seed, "statistics-noise", *keys)
    return statistics.blurred(work.config.statistics_noise, generator)


def _trained_statistics(work: LocalWork) -> NormalizationStatistics:
    return NormalizationStatistics.from_state_dict(
        work.model.state_dict(), layers=work.config.statistics_layers
    )


def _probe(work: LocalWork) -> NormalizationStatistics:
    if not len(work.data.x):
        raise FedFusionError("this client has no examples to probe; give it data or leave it out")
    return NormalizationStatistics.probe(
        work.model, torch.split(work.data.x, EVALUATION_BATCH), layers=work.config.statistics_layers
    )


def _answer(message: Message, context: Context, work: Callable[[LocalWork], RecordDict]) -> Message:
    """Run one handler; errors that a user can act on become error replies of one sentence."""
    try:
        ready = _prepare(message, context)
        content = work(ready)
    except (FedFusionError, StatisticsError) as problem:
        return Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, str(problem)), reply_to=message)
    identity = ConfigRecord({protocol.SERVER_ROUND: ready.server_round})
    if ready.partition_id is not None:
        identity[protocol.PARTITION_ID] = ready.partition_id
    content[protocol.CLIENT] = identity
    return Message(content, reply_to=message)


def _prepare(message: Message, context: Context) -> LocalWork:
    config = _node_config(context)
    torch.set_num_threads(config.threads_per_client)
    partition_id = _partition_id(context, config)
    sent = message.content.config_records[protocol.CONFIG]
    _check_signature(sent, config)
    state = protocol.state_from_record(message.content.array_records[protocol.ARRAYS])
    return LocalWork.prepare(config, partition_id, sent, state)


def _node_config(context: Context) -> RunConfig:
    """The run's config, with this node's own data folder."""
    config = RunConfig.from_run_config(context.run_config)
    root = context.node_config.get("data-root", config.data_root)
    if not isinstance(root, str):
        raise ConfigError(f"this node's data-root = {root!r} is not allowed: it must be a string")
    return dataclasses.replace(config, data_root=root)


def _check_signature(sent: ConfigRecord, config: RunConfig) -> None:
    """Refuse data that the model was not made for; the server may leave the signature out."""
    expected = sent.get(protocol.DATA_SIGNATURE)
    if expected is None:
        return
    difference = signature_difference(str(expected), data_for(config).signature)
    if difference:
        raise FedFusionError(
            f"this node's data set differs from the server's in {difference}; copy classes.txt or "
            "vocabulary.txt from the run directory into this node's data-root"
        )


def _partition_id(context: Context, config: RunConfig) -> int | None:
    """The node's partition; None if its config names none, because it has its own data."""
    partition_id = context.node_config.get("partition-id")
    if partition_id is None:
        return None
    partitions = context.node_config.get("num-partitions", config.num_clients)
    if partitions != config.num_clients:
        raise ConfigError(
            f"num-clients = {config.num_clients}, but this federation has {partitions} partitions; "
            "make num-clients and the federation's num-supernodes equal"
        )
    if type(partition_id) is not int or not 0 <= partition_id < config.num_clients:
        raise ConfigError(
            f"partition-id = {partition_id!r} is not allowed: a whole number from 0 to "
            f"{config.num_clients - 1}"
        )
    return partition_id
