# SPDX-License-Identifier: Apache-2.0
"""What a client does with a message: train, evaluate, or answer a probe query.

Data and model are built once per process and reused over rounds and clients; a reply depends only
on the message, the run config and the node config.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Error, Message, MetricRecord, RecordDict
from flwr.common.constant import ErrorCode
from torch import Tensor, nn
from torch.nn import functional as F

from fedfusion_flwr import protocol
from fedfusion_flwr.app.training import (
    EVALUATION_BATCH,
    evaluate_with_prior,
    least_loss,
    train,
)
from fedfusion_flwr.calibration import label_log_prior
from fedfusion_flwr.computation import choose_device, place_model
from fedfusion_flwr.config import ConfigError, RunConfig
from fedfusion_flwr.data import (
    NO_AUGMENTATION,
    LocalData,
    augment,
    client_key,
    data_for,
    local_data,
    on_device,
    signature_difference,
)
from fedfusion_flwr.errors import FedFusionError
from fedfusion_flwr.federation.round import State
from fedfusion_flwr.fusion import NormalizationStatistics, StatisticsError
from fedfusion_flwr.models import model_for
from fedfusion_flwr.models.resize import fit_to_state
from fedfusion_flwr.randomness import torch_generator


@dataclass(frozen=True)
class _Work:
    """A message with all that it takes to answer it; the first received model is loaded.

    ``key`` is what the client's generators are derived from.
    """

    config: RunConfig
    partition_id: int | None
    key: int
    settings: ConfigRecord
    received: list[State]
    model: nn.Module
    data: LocalData

    @property
    def server_round(self) -> int:
        return int(cast(int, self.settings[protocol.SERVER_ROUND]))

    def setting(self, key: str, otherwise: float) -> float:
        """The strategy's setting if there is one, else ``otherwise``."""
        return float(cast(float, self.settings.get(key, otherwise)))

    @functools.cached_property
    def label_counts(self) -> Tensor:
        """Training examples of each class, (C,), on the CPU."""
        classes = data_for(self.config).num_classes
        return torch.bincount(self.data.y.cpu(), minlength=classes)

    @property
    def criterion(self) -> Callable[[Tensor, Tensor], Tensor]:
        """The loss of local training, calibrated if the server says so."""
        own = max(self.config.label_calibration, 0.0)
        tau = self.setting(protocol.LABEL_CALIBRATION, own)
        if not tau:
            return F.cross_entropy
        # As `calibrated_cross_entropy`, which would compute the prior anew in every step.
        offset = (tau * label_log_prior(self.label_counts)).to(self.data.x.device)
        return lambda logits, labels: F.cross_entropy(logits + offset, labels)

    def choose(self) -> dict[str, int]:
        """If several models came, load the one of least training loss (IFCA); report it."""
        if protocol.NUM_MODELS not in self.settings:
            return {}
        chosen = least_loss(self.model, self.received, self.data.x, self.data.y)
        examples = len(self.received) * len(self.data.x)
        return {protocol.CLUSTER: chosen, protocol.FORWARD_EXAMPLES: examples}


def handle_train(message: Message, context: Context) -> Message:
    """Train on local data; reply with state dict, normalization record and metrics."""
    return _answer(message, context, _train)


def handle_evaluate(message: Message, context: Context) -> Message:
    """Reply with the received model's loss and accuracies on the client's held-out part."""
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
    normalization: dict[str, ArrayRecord] = {}
    if config.statistics_source == "probe":
        normalization = _normalization(_probe, work)
        looked = reported.get(protocol.FORWARD_EXAMPLES, 0)
        reported[protocol.FORWARD_EXAMPLES] = looked + len(data.x)
    phase = str(work.settings.get(protocol.PHASE, protocol.TRAINING))
    result = train(
        work.model,
        data.x,
        data.y,
        epochs=int(work.setting(protocol.LOCAL_EPOCHS, config.local_epochs)),
        batch_size=config.batch_size,
        learning_rate=work.setting(protocol.LEARNING_RATE, config.learning_rate),
        momentum=config.momentum,
        weight_decay=config.weight_decay,
        generator=torch_generator(config.seed, phase, work.server_round, work.key),
        fused_normalization=config.local_normalization == "fused"
        and work.server_round >= config.fused_from_round,
        augment=_augmenter(work),
        precision=config.precision,
        compiled=config.compile,
        proximal_mu=work.setting(protocol.PROXIMAL_MU, 0),
        max_steps=int(work.setting(protocol.MAX_STEPS, 0)) or None,
        frozen=set(cast(list[str], work.settings.get(protocol.FROZEN, []))),
        criterion=work.criterion,
    )
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


def _augmenter(work: _Work) -> Callable[[Tensor], Tensor] | None:
    """The augmentation of a batch of training inputs, with its own generator."""
    data = data_for(work.config)
    if not work.config.augment or data.augmentation == NO_AUGMENTATION:
        return None
    generator = torch_generator(work.config.seed, "augmentation", work.server_round, work.key)
    return functools.partial(
        augment, augmentation=data.augmentation, generator=generator, fill=data.black
    )


def _evaluate(work: _Work) -> RecordDict:
    if not len(work.data.x_validation):
        raise FedFusionError("this client has no validation examples; raise validation-fraction")
    reported: dict[str, float] = {protocol.NUM_EXAMPLES: len(work.data.x_validation)}
    reported |= work.choose()
    held_out, prior = work.data, label_log_prior(work.label_counts)
    found = evaluate_with_prior(
        work.model, held_out.x_validation, held_out.y_validation, prior, work.config.precision
    )
    reported |= {
        "personalized-loss": found.loss,
        "personalized-accuracy": found.accuracy,
        "personalized-prior-accuracy": found.prior_accuracy,
    }
    return RecordDict({protocol.METRICS: MetricRecord(dict(reported))})


def _query(work: _Work) -> RecordDict:
    return RecordDict(
        {
            protocol.NORMALIZATION: protocol.record_from_statistics(_blurred(_probe(work), work)),
            protocol.METRICS: MetricRecord({protocol.NUM_EXAMPLES: len(work.data.x)}),
        }
    )


def _normalization(
    read: Callable[[_Work], NormalizationStatistics], work: _Work
) -> dict[str, ArrayRecord]:
    """The normalization record, or nothing if the model has no such statistics.

    A strategy that needs them has refused the model at the start of the run.
    """
    try:
        statistics = _blurred(read(work), work)
        return {protocol.NORMALIZATION: protocol.record_from_statistics(statistics)}
    except StatisticsError:
        return {}


def _blurred(statistics: NormalizationStatistics, work: _Work) -> NormalizationStatistics:
    """Add ``statistics-noise``; the model sent with it still has exact running statistics."""
    if not work.config.statistics_noise:
        return statistics
    keys = work.server_round, work.key
    generator = torch_generator(work.config.seed, "statistics-noise", *keys)
    return statistics.blurred(work.config.statistics_noise, generator)


def _trained_statistics(work: _Work) -> NormalizationStatistics:
    return NormalizationStatistics.from_state_dict(
        work.model.state_dict(), layers=work.config.statistics_layers
    )


def _probe(work: _Work) -> NormalizationStatistics:
    if not len(work.data.x):
        raise FedFusionError("this client has no examples to probe; give it data or leave it out")
    return NormalizationStatistics.probe(
        work.model, torch.split(work.data.x, EVALUATION_BATCH), layers=work.config.statistics_layers
    )


def _answer(message: Message, context: Context, work: Callable[[_Work], RecordDict]) -> Message:
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


def _prepare(message: Message, context: Context) -> _Work:
    config = _node_config(context)
    torch.set_num_threads(config.threads_per_client)
    partition_id = _partition_id(context, config)
    sent = message.content.config_records[protocol.CONFIG]
    _check_signature(sent, config)
    device = choose_device(config.device, config.precision)
    data = on_device(local_data(config, partition_id), device)
    state = protocol.state_from_record(message.content.array_records[protocol.ARRAYS])
    packed = protocol.NUM_MODELS in sent
    received = list(protocol.unpack_states(state).values()) if packed else [state]
    model = fit_to_state(_model(config, device.type), received[0])
    model.load_state_dict(received[0])
    key = client_key(config, partition_id)
    return _Work(config, partition_id, key, sent, received, model, data)


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


@functools.lru_cache(maxsize=2)
def _model(config: RunConfig, device: str) -> nn.Module:
    """A model to load parameters into; its initial values do not matter."""
    model = model_for(config, data_for(config))
    return place_model(model, torch.device(device))


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
