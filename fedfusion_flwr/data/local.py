# SPDX-License-Identifier: Apache-2.0
"""What one client or the server works on; built once per process."""

from __future__ import annotations

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
    """One client's training and validation part, on the CPU."""

    x: Tensor
    y: Tensor
    x_validation: Tensor
    y_validation: Tensor


def partition_spec(config: RunConfig) -> PartitionSpec:
    """The partition that a run config asks for."""
    return PartitionSpec(
        kind=cast(Any, config.partition),
        num_clients=config.num_clients,
        seed=config.seed,
        dirichlet_alpha=config.dirichlet_alpha,
        min_partition_size=config.min_partition_size,
        classes_per_client=config.classes_per_client,
        shards_per_client=config.shards_per_client,
        planted_components=config.planted_components,
        component_mixing=config.component_mixing,
        component_sizes=cast(Any, config.component_sizes),
        component_transform=cast(Any, config.component_transform),
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
    """The examples of one client.

    A partition of the training data, transformed as its components ask; or without a partition id
    all of it: then the client is a device with data of its own.
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
    """What a client's generators are derived of: its partition id, or a digest of its labels.

    A device without partition id has no other number that is the same in every run; two of them
    with the very same labels draw the same.
    """
    if partition_id is not None:
        return partition_id
    labels = data_for(config).y_train.numpy().tobytes()
    return int.from_bytes(hashlib.sha256(labels).digest()[:8])


def central_test_data(config: RunConfig) -> tuple[Tensor, Tensor]:
    """The server's test set; planted components are all shown in it."""
    data = data_for(config)
    x = data.inputs(data.x_test)
    if config.partition != "components":
        return x, data.y_test
    shown = central_components(data.y_test.numpy(), data.num_classes, partition_spec(config))
    return _shown(x, shown, config), data.y_test


def _shown(x: Tensor, components: np.ndarray, config: RunConfig) -> Tensor:
    kind = cast(Any, config.component_transform)
    return transform_component(x, components, config.planted_components, kind)


def on_device(data: LocalData, device: torch.device) -> LocalData:
    """The same data on a device; no copy where it is there already."""
    return LocalData(
        data.x.to(device),
        data.y.to(device),
        data.x_validation.to(device),
        data.y_validation.to(device),
    )
