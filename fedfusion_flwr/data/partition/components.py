# SPDX-License-Identifier: Apache-2.0
"""Planted components: client data whose true mixture is known, to judge an inference by."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fedfusion_flwr.config import ComponentSizes, ComponentTransform
from fedfusion_flwr.data.partition.spec import (
    Partition,
    PartitionError,
    PartitionSpec,
    by_owner,
    require,
    seeded,
)


def plant(labels: np.ndarray, num_classes: int, spec: PartitionSpec) -> Partition:
    """A partition of kind ``components``, with its mixtures."""
    clients, count = spec.num_clients, spec.planted_components
    allowed = f"at most {clients}, because each component needs one of `num-clients`"
    require(count <= clients, "planted-components", count, allowed)
    if spec.component_transform == "none":
        allowed = f"at most {num_classes}, the classes, unless `component-transform` is rotate"
        require(count <= num_classes, "planted-components", count, allowed)
    sizes = clients_per_component(clients, count, spec.component_sizes)
    # Shuffled, so that a client's number does not give its component away.
    main = seeded(spec.seed, "component-clients").permutation(np.arange(count).repeat(sizes))
    mixtures = _mixtures(main, spec)
    available = np.bincount(labels, minlength=num_classes)
    shares = mixtures[:, :, None] * _class_shares(num_classes, spec)
    return _draw(_common_counts(shares, available, spec), labels, mixtures, spec.seed)


def central_components(labels: np.ndarray, num_classes: int, spec: PartitionSpec) -> np.ndarray:
    """The planted component under which each central test example is shown, (N,), int64.

    Uniform over the components that have the example's class; ``labels`` (N,) are those of the test
    examples, and `PartitionError` is raised for a spec of another kind.
    """
    if spec.kind != "components":
        raise PartitionError(f"`partition` is {spec.kind!r}; only 'components' has any planted.")
    if spec.component_transform == "none":
        return _owner(labels, num_classes, spec)
    rng = seeded(spec.seed, "test-components")
    return rng.integers(spec.planted_components, size=len(labels))


def clients_per_component(
    num_clients: int, num_components: int, sizes: ComponentSizes
) -> np.ndarray:
    """Number of clients whose main component is m, shape (M,), non-increasing, sum K, at least 1.

    Long-tailed: half as many as for the component before.
    """
    weight = (1.0 if sizes == "balanced" else 0.5) ** np.arange(num_components)
    counts = _largest_remainder(
        num_clients * weight / weight.sum(), num_clients, np.zeros(num_components)
    )
    counts[counts == 0] = 1
    while counts.sum() > num_clients:
        # The last of the largest, so that the sizes stay in order.
        counts[num_components - 1 - int(counts[::-1].argmax())] -= 1
    return counts


def transform_component(
    x: Tensor, component: np.ndarray, num_components: int, kind: ComponentTransform
) -> Tensor:
    """The images (N, C, H, W) as their planted components (N,), of M in all, show them.

    ``rotate`` turns those of component m counterclockwise by m * 360 / M degrees, exactly if that
    is a multiple of 90; images must be square, and uncovered corners get the image's darkest
    value. ``none`` returns ``x`` itself.
    """
    if component.shape != (len(x),):
        raise ValueError(f"component must have shape ({len(x)},), got {component.shape}")
    if kind == "none":
        return x
    height, width = x.shape[2], x.shape[3]
    if height != width:
        raise PartitionError(
            f"`component-transform` is 'rotate', which needs square images; these are "
            f"{height}x{width}."
        )
    result = x.clone()
    for m in range(1, num_components):
        mask = torch.from_numpy(component == m).to(x.device)
        if mask.any():
            result[mask] = _rotate(x[mask], m, num_components)
    return result


def _rotate(x: Tensor, component: int, num_components: int) -> Tensor:
    quarters, rest = divmod(4 * component, num_components)
    if rest == 0:
        return torch.rot90(x, quarters, dims=(2, 3))
    # Here and not above: the import takes about a second, in every process of a simulation.
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms.functional import rotate

    # Zero would be mid-grey in normalized images, and would give the angle away.
    darkest = x.amin(dim=(1, 2, 3), keepdim=True)
    turned: Tensor = rotate(
        x - darkest, 360 * component / num_components, interpolation=InterpolationMode.BILINEAR
    )
    return turned + darkest


def _mixtures(main: np.ndarray, spec: PartitionSpec) -> np.ndarray:
    """The clients' mixtures, (K, M): one-hot, or drawn and the largest share given to ``main``."""
    if spec.component_mixing == 0:
        return np.asarray(np.eye(spec.planted_components)[main])
    concentration = np.full(spec.planted_components, spec.component_mixing)
    rng = seeded(spec.seed, "component-mixtures")
    mixtures: np.ndarray = rng.dirichlet(concentration, size=len(main))
    for mixture, m in zip(mixtures, main, strict=True):
        largest = mixture.argmax()
        mixture[[m, largest]] = mixture[[largest, m]]
    return mixtures


def _class_shares(num_classes: int, spec: PartitionSpec) -> np.ndarray:
    """Q, shape (M, C): the share of class c in component m; rows sum to 1."""
    count = spec.planted_components
    if spec.component_transform != "none":
        return np.full((count, num_classes), 1 / num_classes)
    owner = _owner(np.arange(num_classes), num_classes, spec)
    owned = owner == np.arange(count)[:, None]
    return np.asarray(owned / owned.sum(1, keepdims=True))


def _owner(labels: np.ndarray, num_classes: int, spec: PartitionSpec) -> np.ndarray:
    """The only component that has the class, where components differ in their classes."""
    return np.asarray(labels, dtype=np.int64) * spec.planted_components // num_classes


def _common_counts(shares: np.ndarray, available: np.ndarray, spec: PartitionSpec) -> np.ndarray:
    """Examples that each client gets of each component and class, (K, M, C), int64.

    All clients get the same total, the largest that ``available`` (C,) allows without drawing an
    example twice.
    """
    demand = shares.sum((0, 1))
    wanted = demand > 0
    bound = int((available[wanted] / demand[wanted]).min() + 1e-9)
    for size in range(bound, 0, -1):
        # Rounding to whole examples can ask for more of a class than its exact share.
        counts = _whole_counts(shares, size, available)
        if (counts.sum((0, 1)) <= available).all():
            return counts
    raise PartitionError(
        f"With `num-clients` {spec.num_clients} and `planted-components` "
        f"{spec.planted_components} the training data has too few examples of some class for "
        "equal clients: lower `num-clients`."
    )


def _whole_counts(shares: np.ndarray, size: int, available: np.ndarray) -> np.ndarray:
    """Round ``size * shares`` (K, M, C) so that every client has ``size`` examples."""
    num_clients, num_components, num_classes = shares.shape
    counts = np.zeros((num_clients, num_components * num_classes), dtype=np.int64)
    taken = np.zeros(num_classes)
    for client in range(num_clients):
        # Equal remainders go to the class least used so far: otherwise all clients would round the
        # same class up, and exhaust it.
        used = np.tile(taken / np.maximum(available, 1), num_components)
        counts[client] = _largest_remainder(size * shares[client].ravel(), size, used)
        taken += counts[client].reshape(num_components, num_classes).sum(0)
    return counts.reshape(shares.shape)


def _largest_remainder(exact: np.ndarray, total: int, tie_break: np.ndarray) -> np.ndarray:
    """Whole numbers that sum to ``total``; equal remainders by lowest ``tie_break``, then index."""
    # The small number keeps 2.9999999 a 3, so that rounding errors do not decide.
    counts = np.floor(exact + 1e-9).astype(np.int64)
    remainder = np.round(exact - counts, 9)
    order = np.lexsort((tie_break, -remainder))
    counts[order[: total - counts.sum()]] += 1
    return counts


def _draw(counts: np.ndarray, labels: np.ndarray, mixtures: np.ndarray, seed: int) -> Partition:
    """Draw ``counts`` (K, M, C) examples at random, by class and component within a class."""
    num_clients, num_components, num_classes = counts.shape
    cell = np.full(len(labels), -1)
    """Client and component of each drawn example, as one number."""
    for label in range(num_classes):
        pool = seeded(seed, "component-examples", label).permutation(
            np.flatnonzero(labels == label)
        )
        drawn = np.arange(num_clients * num_components).repeat(counts[:, :, label].ravel())
        cell[pool[: len(drawn)]] = drawn
    parts = by_owner(cell // num_components, num_clients)
    return Partition(parts, mixtures, tuple(cell[part] % num_components for part in parts))
