# SPDX-License-Identifier: Apache-2.0
"""Makes the partition that a spec names, and splits one client's part."""

from __future__ import annotations

import numpy as np

from fedfusion_flwr.data.partition.components import plant
from fedfusion_flwr.data.partition.flower import draw_with_flower
from fedfusion_flwr.data.partition.spec import (
    Partition,
    PartitionError,
    PartitionSpec,
    require,
    seeded,
)
from fedfusion_flwr.data.partition.users import deal_users


def make_partition(
    labels: np.ndarray, num_classes: int, spec: PartitionSpec, users: np.ndarray | None = None
) -> Partition:
    """Divide the training examples among the clients.

    Parameters
    ----------
    labels : np.ndarray
        Labels in [0, ``num_classes``), shape (N,).
    num_classes : int
        C.
    spec : PartitionSpec
        What is wanted.
    users : np.ndarray or None
        Who wrote each example, shape (N,); only kind ``user`` needs it.

    Returns
    -------
    Partition
        The same for equal arguments, in every process: each node finds its part without
        communication. ``shards`` and ``components`` leave out the examples that cannot be divided
        equally, ``pathological`` the classes for which there is no room.

    Raises
    ------
    PartitionError
        If the data cannot be divided that way; names the key to change.
    """
    total = len(labels)
    if total == 0 or labels.min() < 0 or labels.max() >= num_classes:
        raise PartitionError(
            f"The training data must have at least one example and labels from 0 to "
            f"{num_classes - 1}."
        )
    allowed = f"at most {total}, because the training data has {total} examples"
    require(spec.num_clients <= total, "num-clients", spec.num_clients, allowed)
    if spec.kind == "components":
        return plant(labels, num_classes, spec)
    if spec.kind == "user":
        return deal_users(users, spec)
    return draw_with_flower(labels, spec)


def local_split(
    indices: np.ndarray, fraction: float, seed: int, partition_id: int
) -> tuple[np.ndarray, np.ndarray]:
    """Split one client's examples into training and validation.

    Parameters
    ----------
    indices : np.ndarray
        The client's examples, shape (n,), n at least 1.
    fraction : float
        Share of validation examples, in [0, 1). Above 0, a client of two examples or more holds
        out at least one; one training example always remains.
    seed, partition_id : int
        Seed of the draw, and the client, which draws its own.

    Returns
    -------
    tuple[np.ndarray, np.ndarray]
        Sorted positions in ``indices`` (not the indices themselves) of train and of validation.

    Raises
    ------
    PartitionError
        If the fraction is out of range or the client has no examples.
    """
    count = len(indices)
    if not 0 <= fraction < 1:
        raise PartitionError(
            f"The validation fraction is {fraction}; it must be at least 0 and below 1."
        )
    if count == 0:
        raise PartitionError(f"Client {partition_id} has no examples to divide.")
    held_out = min(max(round(count * fraction), 1), count - 1) if fraction > 0 else 0
    order = seeded(seed, "local-split", partition_id).permutation(count)
    return np.sort(order[held_out:]), np.sort(order[:held_out])
