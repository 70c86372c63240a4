# SPDX-License-Identifier: Apache-2.0
"""The data of one client or of the server; built once per process."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from fedfusion_flwr.config import RunConfig
from fedfusion_flwr.data.dataset import FederatedData
from fedfusion_flwr.data.partition import (
    Partition,
    PartitionError,
    PartitionSpec,
    central_components,
    local_split,
    make_partition,
    transform_component,
)
from fedfusion_flwr.data.sources import data_for


@dataclass(frozen=True)
class LocalData:
    """One client's training and validation part."""

    x: Tensor
    y: Tensor
    x_validation: Tensor
    y_validation: Tensor


def partition_spec(config: RunConfig) -> PartitionSpec:
    """The partition that a run config asks for."""
    names = {field.name for field in dataclasses.fields(PartitionSpec)} - {"kind"}
    return PartitionSpec(
        cast(Any, config.partition), **{name: getattr(config, name) for name in names}
    )


def partition_for(config: RunConfig) -> Partition:
    """Who holds which training example; the same on every node."""
    return _partition(data_for(config), partition_spec(config))


@functools.lru_cache(maxsize=4)
def _partition(data: FederatedData, spec: PartitionSpec) -> Partition:
    if data.is_text and (spec.kind, spec.component_transform) == ("components", "rotate"):
        raise PartitionError(
            f"`component-transform` is 'rotate', which turns images, but data set {data.name!r} "
            "holds texts; set it to 'none'."
        )
    return make_partition(data.y_train.numpy(), data.num_classes, spec, data.users)


@functools.lru_cache(maxsize=1024)
def local_data(config: RunConfig, partition_id: int | None) -> LocalData:
    """One client's examples, on the CPU.

    Its part of the training data, shown as its planted components ask; or all of it without a
    partition id: then the client is a device with data of its own.
    """
    data = data_for(config)
    if partition_id is None:
        indices = np.arange(len(data.y_train))
        x = data.inputs(data.x_train)
    else:
        cut = partition_for(config)
        indices = cut.indices[partition_id]
        x = data.inputs(data.x_train[indices])
        if cut.example_components is not None:
            x = _shown(x, cut.example_components[partition_id], config)
    y = data.y_train[indices]
    key = client_key(config, partition_id)
    train, validation = local_split(indices, config.validation_fraction, config.seed, key)
    return LocalData(x[train], y[train], x[validation], y[validation])


def client_key(config: RunConfig, partition_id: int | None) -> int:
    """The client's key for its generators: its partition id, or a digest of its labels.

    A device without a partition id has no other number that is the same in every run; two devices
    with the very same labels draw the same.
    """
    if partition_id is not None:
        return partition_id
    labels = data_for(config).y_train.numpy().tobytes()
    return int.from_bytes(hashlib.sha256(labels).digest()[:8])


def central_test_data(config: RunConfig) -> tuple[Tensor, Tensor]:
    """The server's test inputs and labels; planted components all appear in it."""
    data = data_for(config)
    x = data.inputs(data.x_test)
    if config.partition != "components":
        return x, data.y_test
    shown = central_components(data.y_test.numpy(), data.num_classes, partition_spec(config))
    return _shown(x, shown, config), data.y_test


def _shown(x: Tensor, components: np.ndarray, config: RunConfig) -> Tensor:
    return transform_component(x, components, config.planted_components, config.component_transform)


def on_device(data: LocalData, device: torch.device) -> LocalData:
    """The same data on a device; no copy if it is there already."""
    return LocalData(**{name: tensor.to(device) for name, tensor in vars(data).items()})
