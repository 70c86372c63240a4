# SPDX-License-Identifier: Apache-2.0
"""Makes the partition that a spec names, and splits one client's part."""

from __future__ import annotations

import heapq

import numpy as np

from fedfusion_flwr.data.partition.components import plant
from fedfusion_flwr.data.partition.flower import draw_with_flower
from fedfusion_flwr.data.partition.spec import (
    Partition,
    PartitionError,
    PartitionSpec,
    by_owner,
    require,
    seeded,
)


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
        return _deal_users(users, spec)
    return draw_with_flower(labels, spec)


def local_split(
    indices: np.ndarray, fraction: float, seed: int, partition_id: int
) -> tuple[np.ndarray, np.ndarray]:
    """Sorted positions in ``indices`` (n,), not the indices themselves, of train and validation.

    ``fraction`` in [0, 1) is the share of validation examples. Above 0, a client of two examples or
    more holds out at least one; one training example always remains. Each client draws its own.

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


def _deal_users(users: np.ndarray | None, spec: PartitionSpec) -> Partition:
    """A partition of kind ``user``, from who wrote each example, shape (N,).

    Users come by falling number of examples, and each goes to the client that has the fewest; the
    seed decides between equals, so that the users' order does not show in the clients.
    """
    if users is None:
        raise PartitionError(
            "`partition` is 'user', but this data set does not say who made its examples; choose "
            "another `partition`."
        )
    _, user_of, sizes = np.unique(users, return_inverse=True, return_counts=True)
    if len(sizes) < spec.num_clients:
        only = "just one user, perhaps a placeholder," if len(sizes) == 1 else f"{len(sizes)} users"
        raise PartitionError(
            f"`partition` is 'user' and `num-clients` {spec.num_clients}, but the training data "
            f"names {only} and every client needs one; lower `num-clients` or choose another "
            "`partition`."
        )
    rng = seeded(spec.seed, "partition-user")
    shuffled = rng.permutation(len(sizes))
    # A heap of (examples, tie break, client), with the smallest client on top.
    clients = [(0, int(tie), k) for k, tie in enumerate(rng.permutation(spec.num_clients))]
    heapq.heapify(clients)
    client_of = np.empty(len(sizes), dtype=np.int64)
    for user in shuffled[np.argsort(-sizes[shuffled], kind="stable")]:
        total, tie, client = clients[0]
        client_of[user] = client
        heapq.heapreplace(clients, (total + int(sizes[user]), tie, client))
    return Partition(by_owner(client_of[user_of], spec.num_clients))
