# SPDX-License-Identifier: Apache-2.0
"""What a partition is asked for and what it is; every kind of partition reads this."""

from __future__ import annotations

from dataclasses import MISSING, dataclass, fields

import numpy as np

from fedfusion_flwr.config import ComponentSizes, ComponentTransform, PartitionKind
from fedfusion_flwr.config_rules import Rule, at_least, checked, choice
from fedfusion_flwr.errors import FedFusionError

MAX_CONCENTRATION = 1e6
"""Above it a Dirichlet draw is equal shares to six digits; far above, it is NaN."""

MIN_CONCENTRATION = 1e-3
"""Below it a Dirichlet draw is one-hot; far below, the arithmetic underflows."""

_CONCENTRATION = Rule(
    lambda v: MIN_CONCENTRATION <= v <= MAX_CONCENTRATION,
    f"from {MIN_CONCENTRATION:g} to {MAX_CONCENTRATION:g}",
)
_MIXING = Rule(lambda v: v == 0 or _CONCENTRATION.accepts(v), f"0 or {_CONCENTRATION.allowed}")


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

    kind: PartitionKind = choice(PartitionKind, MISSING)
    num_clients: int = checked(MISSING, at_least(1))
    seed: int = checked(MISSING, at_least(0))
    dirichlet_alpha: float = checked(0.1, _CONCENTRATION)
    min_partition_size: int = checked(10, at_least(1))
    classes_per_client: int = checked(2, at_least(1))
    shards_per_client: int = checked(2, at_least(1))
    planted_components: int = checked(5, at_least(1))
    component_mixing: float = checked(0.0, _MIXING)
    component_sizes: ComponentSizes = choice(ComponentSizes, "balanced")
    component_transform: ComponentTransform = choice(ComponentTransform, "none")

    def __post_init__(self) -> None:
        for item in fields(self):
            key = "partition" if item.name == "kind" else item.name.replace("_", "-")
            rule, value = item.metadata["rule"], getattr(self, item.name)
            require(rule.accepts(value), key, value, rule.allowed.replace("'", ""))


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


def by_owner(owner: np.ndarray, num_clients: int) -> tuple[np.ndarray, ...]:
    """The indices of each client's examples, from the owner of each, (N,); nobody is negative."""
    return tuple(np.flatnonzero(owner == client) for client in range(num_clients))


def require(condition: bool, key: str, value: object, allowed: str) -> None:
    """Raise `PartitionError` unless the condition holds."""
    if not condition:
        raise PartitionError(f"`{key}` is {value!r}; it must be {allowed}.")


def seeded(seed: int, purpose: str, index: int = 0) -> np.random.Generator:
    """A generator of its own for each seed, purpose and index.

    Not one of `fedfusion_flwr.randomness`: published results rest on the partitions drawn by this.
    """
    return np.random.default_rng([seed, index, *purpose.encode()])
