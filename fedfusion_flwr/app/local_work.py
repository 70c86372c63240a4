# SPDX-License-Identifier: Apache-2.0
"""A client's model, data and settings for one message, and what it can do with them.

Data and model are built once per process and reused over rounds and clients.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Self, cast

import torch
from flwr.app import ConfigRecord
from torch import Tensor, nn
from torch.nn import functional as F

from fedfusion_flwr import protocol
from fedfusion_flwr.app.training import (
    TrainingResult,
    least_loss,
    measure_running_statistics,
    train,
)
from fedfusion_flwr.calibration import label_log_prior
from fedfusion_flwr.computation import choose_device, place_model
from fedfusion_flwr.config import RunConfig
from fedfusion_flwr.data import (
    NO_AUGMENTATION,
    LocalData,
    augment,
    client_key,
    data_for,
    local_data,
    on_device,
)
from fedfusion_flwr.federation.round import State
from fedfusion_flwr.models import model_for
from fedfusion_flwr.models.resize import fit_to_state
from fedfusion_flwr.randomness import torch_generator


@dataclass(frozen=True)
class LocalWork:
    """A client's model and data for one message; the first received model is loaded.

    Attributes
    ----------
    config : RunConfig
        The run's, with the client's own data folder.
    partition_id : int or None
        Its part of the data; None for a device with data of its own.
    key : int
        What its generators are derived from.
    settings : ConfigRecord
        Sent with the model.
    received : list[State]
        The models that were sent, one but for IFCA.
    model : nn.Module
        On the device; kept for the next message, so its parameters must be loaded anew then.
    data : LocalData
        On the device.
    """

    config: RunConfig
    partition_id: int | None
    key: int
    settings: ConfigRecord
    received: list[State]
    model: nn.Module
    data: LocalData

    @classmethod
    def prepare(
        cls, config: RunConfig, partition_id: int | None, settings: ConfigRecord, state: State
    ) -> Self:
        """Load the state, or the first of those that are packed in it."""
        device = choose_device(config.device, config.precision)
        data = on_device(local_data(config, partition_id), device)
        packed = protocol.NUM_MODELS in settings
        received = list(protocol.unpack_states(state).values()) if packed else [state]
        model = fit_to_state(_model(config, device.type), received[0])
        model.load_state_dict(received[0])
        key = client_key(config, partition_id)
        return cls(config, partition_id, key, settings, received, model, data)

    @property
    def server_round(self) -> int:
        """The round of the message."""
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
    def log_prior(self) -> Tensor:
        """Log q_k, (C,), on the device."""
        return label_log_prior(self.label_counts).to(self.data.x.device)

    def choose(self) -> dict[str, int]:
        """If several models came, load the one of least training loss (IFCA); report it."""
        if protocol.NUM_MODELS not in self.settings:
            return {}
        chosen = least_loss(self.model, self.received, self.data.x, self.data.y)
        examples = len(self.received) * len(self.data.x)
        return {protocol.CLUSTER: chosen, protocol.FORWARD_EXAMPLES: examples}

    def normalize_for_evaluation(self) -> None:
        """Give BatchNorm layers the statistics that ``evaluation-normalization`` asks for.

        With "own" these are the moments of the client's training data under the loaded parameters,
        which stay. A client with fewer than two examples keeps the received statistics.
        """
        if self.config.evaluation_normalization == "own" and len(self.data.x) > 1:
            measure_running_statistics(self.model, self.data.x, batch_statistics=True)

    def fit(
        self,
        phase: str,
        *,
        epochs: int = 1,
        steps: int | None = None,
        augmentation: str = "augmentation",
    ) -> TrainingResult:
        """Train the loaded model on the client's training data as config and settings say.

        Parameters
        ----------
        phase : str
            Purpose of the shuffles' generator, with the round and the client.
        epochs : int
            How long, without ``steps``.
        steps : int or None
            Gradient steps, however many epochs they need.
        augmentation : str
            Purpose of the augmentation's generator.
        """
        config, keys = self.config, (self.server_round, self.key)
        return train(
            self.model,
            self.data.x,
            self.data.y,
            epochs=epochs,
            batch_size=config.batch_size,
            learning_rate=self.setting(protocol.LEARNING_RATE, config.learning_rate),
            momentum=config.momentum,
            weight_decay=config.weight_decay,
            generator=torch_generator(config.seed, phase, *keys),
            fused_normalization=config.local_normalization == "fused"
            and self.server_round >= config.fused_from_round,
            augment=self._augmenter(torch_generator(config.seed, augmentation, *keys)),
            precision=config.precision,
            compiled=config.compile,
            proximal_mu=self.setting(protocol.PROXIMAL_MU, 0),
            max_steps=steps,
            frozen=set(cast(list[str], self.settings.get(protocol.FROZEN, []))),
            criterion=self._criterion(),
        )

    def _augmenter(self, generator: torch.Generator) -> Callable[[Tensor], Tensor] | None:
        """The augmentation of a batch of training inputs."""
        data = data_for(self.config)
        if not self.config.augment or data.augmentation == NO_AUGMENTATION:
            return None
        return functools.partial(
            augment, augmentation=data.augmentation, generator=generator, fill=data.black
        )

    def _criterion(self) -> Callable[[Tensor, Tensor], Tensor]:
        """The loss of local training, calibrated if the server says so."""
        own = max(self.config.label_calibration, 0.0)
        tau = self.setting(protocol.LABEL_CALIBRATION, own)
        if not tau:
            return F.cross_entropy
        # As `calibrated_cross_entropy`, which would compute the prior anew in every step.
        offset = tau * self.log_prior
        return lambda logits, labels: F.cross_entropy(logits + offset, labels)


@functools.lru_cache(maxsize=2)
def _model(config: RunConfig, device: str) -> nn.Module:
    """A model to load parameters into; its initial values do not matter."""
    model = model_for(config, data_for(config))
    return place_model(model, torch.device(device))
