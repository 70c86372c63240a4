# SPDX-License-Identifier: Apache-2.0
"""Partitions of four hundred labels."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from typing import Any, get_args

import numpy as np
from hypothesis import HealthCheck, settings

from fedfusion_flwr.config import PartitionKind
from fedfusion_flwr.data.partition import Partition, PartitionSpec, make_partition

LABELS = np.arange(10).repeat(40)
USERS = np.arange(400) % 100
KINDS = get_args(PartitionKind)
FAST = settings(
    max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True
)


def spec_of(kind: Any, num_clients: int = 10, seed: int = 0, **fields: Any) -> PartitionSpec:
    fields = {"dirichlet_alpha": 0.5, "min_partition_size": 1, **fields}
    return PartitionSpec(kind, num_clients, seed, **fields)


def made(kind: Any, num_clients: int = 10, seed: int = 0, **fields: Any) -> Partition:
    return make_partition(LABELS, 10, spec_of(kind, num_clients, seed, **fields), USERS)


def sizes(result: Partition) -> list[int]:
    return [len(part) for part in result.indices]


def same(a: Partition, b: Partition) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(a.indices, b.indices, strict=True))


def fresh_process(*arguments: str) -> str:
    """What Python prints in a process with other hashes; nothing on its error stream."""
    done = subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, "PYTHONHASHSEED": "12345", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stderr == ""
    return done.stdout


def digest(kind: str) -> str:
    """Of one partition of that kind."""
    indices = made(kind, 12, 7, component_mixing=0.3).indices
    joined = b"|".join(part.astype("<i8").tobytes() for part in indices)
    return hashlib.sha256(joined).hexdigest()[:16]
