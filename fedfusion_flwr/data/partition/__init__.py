# SPDX-License-Identifier: Apache-2.0
"""Which client holds which training examples: a pure function of the labels and a spec."""

from fedfusion_flwr.data.partition.components import central_components, transform_component
from fedfusion_flwr.data.partition.make import local_split, make_partition
from fedfusion_flwr.data.partition.spec import Partition, PartitionError, PartitionSpec

__all__ = [
    "Partition",
    "PartitionError",
    "PartitionSpec",
    "central_components",
    "local_split",
    "make_partition",
    "transform_component",
]
