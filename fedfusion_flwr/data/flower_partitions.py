# SPDX-License-Identifier: Apache-2.0
"""The kinds of partition that Flower's partitioners draw.

Requests are checked in `fedfusion_flwr.data.partition`.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

import numpy as np

from fedfusion_flwr.data.components import PartitionError, seeded

if TYPE_CHECKING:
    from flwr_datasets.partitioner import Partitioner

    from fedfusion_flwr.data.partition import PartitionSpec


def draw_with_flower(labels: np.ndarray, spec: PartitionSpec) -> tuple[np.ndarray, ...]:
    """For each client the sorted indices of its examples, of all kinds but the two of our own.

    Raises
    ------
    PartitionError
        If no draw gives every client what it must have.
    """
    # Here and not above: the imports take seconds, and planted components do without.
    from datasets import Dataset

    rng = seeded(spec.seed, f"partition-{spec.kind}")
    # The partitioners take rows in order, and data sets come sorted by class.
    order = rng.permutation(len(labels))
    # In a seeded order of the classes, so that no two classes always come together.
    relabelled = rng.permutation(int(labels.max()) + 1)[labels[order]]
    seed = int(rng.integers(2**31))
    partitioner, pieces = _partitioner(spec, len(np.unique(labels)), seed)
    partitioner.dataset = Dataset.from_dict({"index": order, "label": relabelled})
    try:
        with warnings.catch_warnings():
            # Of every redraw, and of the classes that more clients would be needed for.
            warnings.simplefilter("ignore")
            drawn = [
                np.asarray(partitioner.load_partition(piece)["index"][:], dtype=np.int64)
                for piece in range(spec.num_clients * pieces)
            ]
    except ValueError as error:
        raise PartitionError(_advice(spec, len(labels))) from error
    grouped = (drawn[k * pieces : (k + 1) * pieces] for k in range(spec.num_clients))
    return tuple(np.sort(np.concatenate(group)) for group in grouped)


def _partitioner(spec: PartitionSpec, num_classes: int, seed: int) -> tuple[Partitioner, int]:
    """Flower's partitioner, and how many of its pieces make one client."""
    from flwr_datasets import partitioner as flower

    clients = spec.num_clients
    if spec.kind == "iid":
        return flower.IidPartitioner(clients), 1
    if spec.kind == "dirichlet":
        return flower.DirichletPartitioner(
            clients,
            "label",
            spec.dirichlet_alpha,
            min_partition_size=spec.min_partition_size,
            self_balancing=False,
            seed=seed,
        ), 1
    if spec.kind == "shards":
        return flower.ShardPartitioner(
            clients, "label", num_shards_per_partition=spec.shards_per_client, seed=seed
        ), 1
    # Every class is used where clients times classes allow it: with enough clients by their first
    # class, with fewer by dealing out the classes in turn, one piece of one class after the other.
    if clients >= num_classes:
        return flower.PathologicalPartitioner(
            clients, "label", spec.classes_per_client, "first-deterministic", seed=seed
        ), 1
    pieces = spec.classes_per_client
    return flower.PathologicalPartitioner(
        clients * pieces, "label", 1, "deterministic", seed=seed
    ), pieces


def _advice(spec: PartitionSpec, total: int) -> str:
    clients = f"`num-clients` {spec.num_clients}"
    if spec.kind == "dirichlet":
        return (
            f"No draw with `dirichlet-alpha` {spec.dirichlet_alpha} and {clients} gave every "
            f"client `min-partition-size` {spec.min_partition_size} of the {total} examples: raise "
            f"`dirichlet-alpha`, or lower `min-partition-size` or `num-clients`."
        )
    return (
        f"With `classes-per-client` {spec.classes_per_client} and {clients} a class is divided "
        f"among more clients than it has examples: lower `num-clients` or `classes-per-client`."
    )
