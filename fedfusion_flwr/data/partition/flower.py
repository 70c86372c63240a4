# SPDX-License-Identifier: Apache-2.0
"""The kinds of partition that Flower's partitioners draw."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

import numpy as np

from fedfusion_flwr.data.partition.spec import (
    Partition,
    PartitionError,
    PartitionSpec,
    require,
    seeded,
)

if TYPE_CHECKING:
    from flwr_datasets.partitioner import Partitioner


_LIMITED = {
    "dirichlet": "min-partition-size",
    "pathological": "classes-per-client",
    "shards": "shards-per-client",
}
"""The key of each kind whose value the data limits."""


def draw_with_flower(labels: np.ndarray, spec: PartitionSpec) -> Partition:
    """A partition of kind ``iid``, ``dirichlet``, ``pathological`` or ``shards``."""
    _check(labels, spec)
    # Here and not above: the imports take seconds, and the other kinds do without.
    from datasets import Dataset

    rng = seeded(spec.seed, f"partition-{spec.kind}")
    # The partitioners take rows in order, and data sets come sorted by class.
    order = rng.permutation(len(labels))
    # Classes in a seeded order too, so that no two of them always come together.
    relabelled = rng.permutation(int(labels.max()) + 1)[labels[order]]
    seed = int(rng.integers(2**31))
    partitioner, pieces = _partitioner(spec, len(np.unique(labels)), seed)
    partitioner.dataset = Dataset.from_dict({"index": order, "label": relabelled})
    try:
        with warnings.catch_warnings():
            # Flower warns of every redraw, and of classes for which there are too few clients.
            warnings.simplefilter("ignore")
            drawn = [
                np.asarray(partitioner.load_partition(piece)["index"][:], dtype=np.int64)
                for piece in range(spec.num_clients * pieces)
            ]
    except ValueError as error:
        raise PartitionError(_advice(spec, len(labels))) from error
    starts = range(0, len(drawn), pieces)
    return Partition(tuple(np.sort(np.concatenate(drawn[k : k + pieces])) for k in starts))


def _check(labels: np.ndarray, spec: PartitionSpec) -> None:
    if spec.kind not in _LIMITED:
        return
    key, total = _LIMITED[spec.kind], len(labels)
    if spec.kind == "pathological":
        most, why = len(np.unique(labels)), ", the classes that the training data has"
    else:
        most, clients = total // spec.num_clients, f"`num-clients` {spec.num_clients}"
        why = f" with {clients}, because the training data has {total} examples"
    value = getattr(spec, key.replace("-", "_"))
    require(value <= most, key, value, f"at most {most}{why}")


def _partitioner(spec: PartitionSpec, num_classes: int, seed: int) -> tuple[Partitioner, int]:
    """Flower's partitioner, and how many of its pieces make one client."""
    from flwr_datasets import partitioner as flower

    clients = spec.num_clients
    if spec.kind == "iid":
        return flower.IidPartitioner(clients), 1
    if spec.kind == "dirichlet":
        alpha, least = spec.dirichlet_alpha, spec.min_partition_size
        return flower.DirichletPartitioner(clients, "label", alpha, least, seed=seed), 1
    if spec.kind == "shards":
        return flower.ShardPartitioner(clients, "label", spec.shards_per_client, seed=seed), 1
    # Every class is used where there is room. With as many clients as classes, each client's first
    # class is dealt in turn; with fewer, all of their classes are, one piece of one class each.
    pieces, draw = spec.classes_per_client, flower.PathologicalPartitioner
    if clients >= num_classes:
        return draw(clients, "label", pieces, "first-deterministic", seed=seed), 1
    return draw(clients * pieces, "label", 1, "deterministic", seed=seed), pieces


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
