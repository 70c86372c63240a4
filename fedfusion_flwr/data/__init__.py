# SPDX-License-Identifier: Apache-2.0
"""Data sets and how they are divided among clients."""

from fedfusion_flwr.data.augmentation import NO_AUGMENTATION, Augmentation, augment
from fedfusion_flwr.data.dataset import DataError, FederatedData, signature_difference
from fedfusion_flwr.data.local import (
    LocalData,
    central_test_data,
    client_key,
    local_data,
    on_device,
    partition_for,
    partition_spec,
)
from fedfusion_flwr.data.partition import Partition, PartitionError, PartitionSpec, make_partition
from fedfusion_flwr.data.sources import data_for, load_data

__all__ = [
    "NO_AUGMENTATION",
    "Augmentation",
    "DataError",
    "FederatedData",
    "LocalData",
    "Partition",
    "PartitionError",
    "PartitionSpec",
    "augment",
    "central_test_data",
    "client_key",
    "data_for",
    "load_data",
    "local_data",
    "make_partition",
    "on_device",
    "partition_for",
    "partition_spec",
    "signature_difference",
]
