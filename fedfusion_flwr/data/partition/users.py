# SPDX-License-Identifier: Apache-2.0
"""The partition by user: every client has all examples of some users."""

from __future__ import annotations

import heapq

import numpy as np

from fedfusion_flwr.data.partition.spec import Partition, PartitionError, PartitionSpec, seeded


def deal_users(users: np.ndarray | None, spec: PartitionSpec) -> Partition:
    """A partition of kind ``user``, from who wrote each example, shape (N,).

    Users come by falling number of examples, and each goes to the client that has the fewest; the
    seed decides between equals, so that the users' order does not show in the clients.

    Raises
    ------
    PartitionError
        If the users are not known, or fewer than the clients.
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
    owner = client_of[user_of]
    return Partition(tuple(np.flatnonzero(owner == k) for k in range(spec.num_clients)))
