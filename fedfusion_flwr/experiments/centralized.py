# SPDX-License-Identifier: Apache-2.0
"""The reference: a model trained on the pooled data, with a federated run's gradient steps."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import save

from fedfusion_flwr.app.training import evaluate, train
from fedfusion_flwr.computation import choose_device, place_model
from fedfusion_flwr.config import RunConfig
from fedfusion_flwr.data import NO_AUGMENTATION, augment, central_test_data, data_for, partition_for
from fedfusion_flwr.data.partition import local_split
from fedfusion_flwr.experiments.bias import measure_bias
from fedfusion_flwr.experiments.results import rounded
from fedfusion_flwr.experiments.rows import Row, identity, write_bytes
from fedfusion_flwr.models import model_for
from fedfusion_flwr.randomness import torch_generator
from fedfusion_flwr.tracking import state_digest


def train_centralized(
    config: dict[str, Any],
    folder: str,
    model_file: str,
    batch_seed: int,
    steps: int | None = None,
    references: Sequence[Mapping[str, Any]] = (),
) -> Row:
    """Train the model of a run config on the training data of all clients together.

    It begins as the federated run of the same seed does, with that run's batch size, rate, momentum
    and weight decay. As many examples are held out as clients hold out. After every epoch the
    model is tested and the optimizer starts anew, as clients' do in every round.

    Parameters
    ----------
    config : dict[str, Value]
        Run-config overrides. The partition only says how many steps the federated run takes; a
        strategy's keys mean nothing here.
    folder, model_file : str
        Where the model is saved, as safetensors.
    batch_seed : int
        Of the order of the batches, of crops and flips, and of nothing else.
    steps : int or None
        Gradient steps; by default those of the federated run with this config.
    references : sequence of Mapping
        Other such models to compare with, see `bias.measure_bias`.

    Returns
    -------
    Row
        ``accuracy``, ``loss`` and ``checkpoints`` (gradient steps so far) of the initial model and
        after every epoch, ``steps`` in all, ``digest``, ``seconds``, ``bias`` and what identifies
        the run.
    """
    about, started = identity(), time.perf_counter()
    parsed = RunConfig.from_run_config(config)
    data, device = data_for(parsed), choose_device(parsed.device, parsed.precision)
    x_test, y_test = (part.to(device) for part in central_test_data(parsed))
    everything = np.arange(len(data.y_train))
    kept, _ = local_split(everything, parsed.validation_fraction, parsed.seed, 0)
    x, y = data.inputs(data.x_train[kept]).to(device), data.y_train[kept].to(device)
    model = place_model(model_for(parsed, data), device)
    epoch = math.ceil(len(y) / parsed.batch_size)
    total = federated_steps(parsed) if steps is None else steps

    checkpoints, losses, accuracies = [0], [], []
    while True:
        loss, accuracy = evaluate(model, x_test, y_test, parsed.precision)
        losses.append(loss)
        accuracies.append(accuracy)
        if checkpoints[-1] >= total:
            break
        number = len(checkpoints)
        augmentation = None
        if parsed.augment and data.augmentation != NO_AUGMENTATION:
            augmentation = functools.partial(
                augment,
                augmentation=data.augmentation,
                generator=torch_generator(batch_seed, "centralized-augmentation", number),
                fill=data.black,
            )
        result = train(
            model,
            x,
            y,
            epochs=1,
            batch_size=parsed.batch_size,
            learning_rate=parsed.learning_rate,
            momentum=parsed.momentum,
            weight_decay=parsed.weight_decay,
            generator=torch_generator(batch_seed, "centralized", number),
            augment=augmentation,
            precision=parsed.precision,
            compiled=parsed.compile,
            max_steps=min(epoch, total - checkpoints[-1]),
        )
        checkpoints.append(checkpoints[-1] + result.steps)
    # Clones: safetensors takes no tensors that share memory.
    state = {k: v.cpu().contiguous().clone() for k, v in model.state_dict().items()}
    digest = state_digest(state)
    write_bytes(Path(folder) / model_file, save(state, {"digest": digest}))
    return {
        "accuracy": accuracies,
        "loss": [rounded(value, 8) for value in losses],
        "checkpoints": checkpoints,
        "steps": checkpoints[-1],
        "model_file": model_file,
        "digest": digest,
        "seconds": round(time.perf_counter() - started, 1),
        "bias": measure_bias(config, state, references, drawn=True),
        **about,
    }


def federated_steps(config: RunConfig) -> int:
    """Gradient steps of all clients in a federated run without failures.

    With partial participation the expected number, rounded.
    """
    if config.local_steps:
        return config.num_server_rounds * config.local_steps * config.num_train_clients
    in_epoch = 0
    for client, indices in enumerate(partition_for(config).indices):
        train_part, _ = local_split(indices, config.validation_fraction, config.seed, client)
        in_epoch += steps_of(len(train_part), config.batch_size)
    taking_part = config.num_train_clients / config.num_clients
    return round(config.num_server_rounds * config.local_epochs * taking_part * in_epoch)


def steps_of(examples: int, batch_size: int) -> int:
    """Batches of an epoch; a last batch of one example joins the one before."""
    joins = examples > batch_size and examples % batch_size == 1
    return math.ceil(examples / batch_size) - joins
