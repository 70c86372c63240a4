# SPDX-License-Identifier: Apache-2.0
"""What a partition is asked for and what it is; every kind of partition reads this."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from fedfusion_flwr.errors import FedFusionError

PartitionKind = Literal["iid", "dirichlet", "pathological", "shards", "components", "user"]
ComponentSizes = Literal["balanced", "long-tailed"]
ComponentTransform = Literal["none", "rotate"]

MAX_CONCENTRATION = 1e6
"""Above it a Dirichlet draw is equal shares to six digits; far above, it is NaN."""

MIN_CONCENTRATION = 1e-3
"""Below it a Dirichlet draw is one-hot; far below, the arithmetic underflows."""


class PartitionError(FedFusionError, ValueError):
    """A partition that cannot be made of the data; names the key and what is allowed."""


@dataclass(frozen=True)
class PartitionSpec:
    """The partition that is wanted; each field is the config key of that name in kebab case.

    Attributes
    ----------
    kind : PartitionKind
        ``iid``; ``dirichlet`` (label shares drawn per class); ``pathological`` (few classes each);
        ``shards`` (runs of the examples sorted by label); ``components`` (planted mixtures);
        ``user`` (whole users).
    num_clients, seed : int
        K, and the seed of every draw.
    dirichlet_alpha : float
        Concentration; the smaller, the more the clients differ.
    min_partition_size : int
        Fewest examples of a client, for ``dirichlet``.
    classes_per_client, shards_per_client : int
        For ``pathological`` and ``shards``.
    planted_components : int
        M, for ``components``.
    component_mixing : float
        0 gives each client one component; above 0 its mixture is drawn from a Dirichlet
        distribution with this concentration.
    component_sizes : ComponentSizes
        Whether all components are the main one of equally many clients, or each of half as many as
        the one before.
    component_transform : ComponentTransform
        ``none``: components differ in their classes. ``rotate``: every component has all classes,
        and the images of component m are rotated by m * 360 / M degrees.

    Raises
    ------
    PartitionError
        If a value is wrong for any data.
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
        for key, value, allowed in (
            ("partition", self.kind, get_args(PartitionKind)),
            ("component-sizes", self.component_sizes, get_args(ComponentSizes)),
            ("component-transform", self.component_transform, get_args(ComponentTransform)),
        ):
            require(value in allowed, key, value, f"one of {', '.join(allowed)}")
        for key, count, least in (
            ("num-clients", self.num_clients, 1),
            ("seed", self.seed, 0),
            ("min-partition-size", self.min_partition_size, 1),
            ("classes-per-client", self.classes_per_client, 1),
            ("shards-per-client", self.shards_per_client, 1),
            ("planted-components", self.planted_components, 1),
        ):
            require(count >= least, key, count, f"at least {least}")
        between = f"from {MIN_CONCENTRATION:g} to {MAX_CONCENTRATION:g}"
        alpha, mixing = self.dirichlet_alpha, self.component_mixing
        valid = MIN_CONCENTRATION <= alpha <= MAX_CONCENTRATION
        require(valid, "dirichlet-alpha", alpha, between)
        valid = mixing == 0 or MIN_CONCENTRATION <= mixing <= MAX_CONCENTRATION
        require(valid, "component-mixing", mixing, f"0 or {between}")


@dataclass(frozen=True)
class Partition:
    """Who holds which training example.

    Attributes
    ----------
    indices : tuple[np.ndarray, ...]
        The sorted int64 indices of each client's examples; disjoint, never empty.
    mixtures : np.ndarray or None
        Planted mixtures of kind ``components``, (K, M), rows sum to 1.
    example_components : tuple[np.ndarray, ...] or None
        The planted component of each client's examples, in the order of ``indices``.
    """

    indices: tuple[np.ndarray, ...]
    mixtures: np.ndarray | None = None
    example_components: tuple[np.ndarray, ...] | None = None

    @property
    def main_components(self) -> np.ndarray | None:
        """The component with the largest share of each client's mixture, (K,), int64."""
        return None if self.mixtures is None else self.mixtures.argmax(1)


def require(condition: bool, key: str, value: object, allowed: str) -> None:
    """Raise `PartitionError` unless the condition holds."""
    if not condition:
        raise PartitionError(f"`{key}` is {value!r}; it must be {allowed}.")


def seeded(seed: int, purpose: str, index: int = 0) -> np.random.Generator:
    """A generator of its own for each seed, purpose and index.

    Not one of `fedfusion_flwr.randomness`: published results rest on the partitions drawn by this.
    """
    return np.random.default_rng([seed, index, *purpose.encode()])
