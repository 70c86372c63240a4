# SPDX-License-Identifier: Apache-2.0
"""Which client holds which training examples.

A partition is a pure function of the labels and the spec, so that every node finds its own part
without communication.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from fedfusion_flwr.data.components import (
    ComponentSizes,
    ComponentTransform,
    PartitionError,
    central_components,
    plant,
    seeded,
    transform_component,
)
from fedfusion_flwr.data.flower_partitions import draw_with_flower
from fedfusion_flwr.data.users import deal_users

__all__ = [
    "Partition",
    "PartitionError",
    "PartitionSpec",
    "central_components",
    "local_split",
    "make_partition",
    "transform_component",
]

PartitionKind = Literal["iid", "dirichlet", "pathological", "shards", "components", "user"]

MAX_CONCENTRATION = 1e6
"""Beyond it a Dirichlet draw is equal shares to six digits; far beyond, it is not a number."""

MIN_CONCENTRATION = 1e-3
"""Below it a Dirichlet draw is one-hot, and far below the arithmetic underflows."""


@dataclass(frozen=True)
class PartitionSpec:
    """What partition is wanted; every field is the config key of that name in kebab case.

    Attributes
    ----------
    kind : PartitionKind
        ``iid``; ``dirichlet`` (label shares drawn per class); ``pathological`` (few classes each);
        ``shards`` (runs of the examples sorted by label); ``components`` (planted mixtures);
        ``user`` (whole users).
    num_clients, seed : int
        K, and the seed that every draw derives from.
    dirichlet_alpha : float
        Concentration; the smaller, the more the clients differ.
    min_partition_size : int
        Examples that each client of ``dirichlet`` has at least.
    classes_per_client, shards_per_client : int
        Of ``pathological`` and of ``shards``.
    planted_components : int
        M of ``components``.
    component_mixing : float
        0 gives every client one component; above, its mixture is drawn from a Dirichlet with this
        concentration.
    component_sizes : ComponentSizes
        Whether components are the main one of equally many clients, or of half as many each.
    component_transform : ComponentTransform
        ``none``: components differ in their classes. ``rotate``: each has all classes, and shows
        them rotated, component m by m * 360 / M degrees.
    """

    kind: PartitionKind
    num_clients: int
    seed: int
    dirichlet_alpha: float = 0.1
    min_partition_size: int = 10
    classes_per_client: int = 2
    shards_per_client: int = 2
    planted_components: int = 5
    component_mixing: float = 0.0
    component_sizes: ComponentSizes = "balanced"
    component_transform: ComponentTransform = "none"

    def __post_init__(self) -> None:
        """Raise `PartitionError` for values that are wrong whatever the data is."""
        for key, value, allowed in (
            ("partition", self.kind, get_args(PartitionKind)),
            ("component-sizes", self.component_sizes, get_args(ComponentSizes)),
            ("component-transform", self.component_transform, get_args(ComponentTransform)),
        ):
            _require(value in allowed, key, value, f"one of {', '.join(allowed)}")
        for key, count, least in (
            ("num-clients", self.num_clients, 1),
            ("seed", self.seed, 0),
            ("min-partition-size", self.min_partition_size, 1),
            ("classes-per-client", self.classes_per_client, 1),
            ("shards-per-client", self.shards_per_client, 1),
            ("planted-components", self.planted_components, 1),
        ):
            _require(count >= least, key, count, f"at least {least}")
        between = f"from {MIN_CONCENTRATION:g} to {MAX_CONCENTRATION:g}"
        alpha, mixing = self.dirichlet_alpha, self.component_mixing
        valid = MIN_CONCENTRATION <= alpha <= MAX_CONCENTRATION
        _require(valid, "dirichlet-alpha", alpha, between)
        valid = mixing == 0 or MIN_CONCENTRATION <= mixing <= MAX_CONCENTRATION
        _require(valid, "component-mixing", mixing, f"0 or {between}")


@dataclass(frozen=True)
class Partition:
    """Who holds what.

    Attributes
    ----------
    indices : tuple[np.ndarray, ...]
        For each client the sorted int64 indices of its training examples; disjoint, never empty.
    mixtures : np.ndarray | None
        The planted mixtures of kind ``components``, (K, M), rows sum to 1.
    example_components : tuple[np.ndarray, ...] | None
        For each client the planted component of each of its examples, in the order of ``indices``.
    """

    indices: tuple[np.ndarray, ...]
    mixtures: np.ndarray | None = None
    example_components: tuple[np.ndarray, ...] | None = None

    @property
    def main_components(self) -> np.ndarray | None:
        """The component that counts most in each client's mixture, (K,), int64."""
        return None if self.mixtures is None else self.mixtures.argmax(1)


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
        Who made each example, shape (N,); only kind ``user`` needs it.

    Returns
    -------
    Partition
        The same for equal arguments, in every process. Kinds ``shards`` and ``components`` leave
        out the examples that cannot be divided equally, ``pathological`` the classes that are more
        than all clients together have.

    Raises
    ------
    PartitionError
        If the data cannot be divided that way; names the key to change.
    """
    _check(labels, num_classes, spec)
    if spec.kind == "components":
        return Partition(*plant(labels, num_classes, spec))
    if spec.kind == "user":
        return Partition(deal_users(users, spec))
    return Partition(draw_with_flower(labels, spec))


def local_split(
    indices: np.ndarray, fraction: float, seed: int, partition_id: int
) -> tuple[np.ndarray, np.ndarray]:
    """Divide one client's examples into training and validation.

    Parameters
    ----------
    indices : np.ndarray
        The client's examples, shape (n,), n at least 1.
    fraction : float
        Share of validation examples, in [0, 1). Above 0, a client of at least two examples has at
        least one; one training example always remains.
    seed, partition_id : int
        Seed of the draw, a different one for each client.

    Returns
    -------
    tuple[np.ndarray, np.ndarray]
        Sorted positions in ``indices`` (not the indices themselves) of train and of validation.
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


def _require(condition: bool, key: str, value: object, allowed: str) -> None:
    if not condition:
        raise PartitionError(f"`{key}` is {value!r}; it must be {allowed}.")


def _check(labels: np.ndarray, num_classes: int, spec: PartitionSpec) -> None:
    """Refuse what cannot be done, before anything is drawn."""
    total, clients = len(labels), spec.num_clients
    if total == 0 or labels.min() < 0 or labels.max() >= num_classes:
        raise PartitionError(
            f"The training data must have at least one example and labels from 0 to "
            f"{num_classes - 1}."
        )
    have = f"because the training data has {total} examples"
    _require(clients <= total, "num-clients", clients, f"at most {total}, {have}")
    if spec.kind == "dirichlet":
        size, most = spec.min_partition_size, total // clients
        allowed = f"at most {most} with `num-clients` {clients}, {have}"
        _require(size <= most, "min-partition-size", size, allowed)
    elif spec.kind == "pathological":
        classes, most = spec.classes_per_client, len(np.unique(labels))
        allowed = f"at most {most}, the classes that the training data has"
        _require(classes <= most, "classes-per-client", classes, allowed)
    elif spec.kind == "shards":
        shards, most = spec.shards_per_client, total // clients
        allowed = f"at most {most} with `num-clients` {clients}, {have}"
        _require(shards <= most, "shards-per-client", shards, allowed)
    elif spec.kind == "components":
        components = spec.planted_components
        allowed = f"at most {clients}, because each component needs one of `num-clients`"
        _require(components <= clients, "planted-components", components, allowed)
        if spec.component_transform == "none":
            allowed = f"at most {num_classes}, the classes, unless `component-transform` is rotate"
            _require(components <= num_classes, "planted-components", components, allowed)
