# SPDX-License-Identifier: Apache-2.0
"""Planted components: client data whose true mixture is known, to judge an inference by.

Requests are checked in `fedfusion_flwr.data.partition`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from torch import Tensor

from fedfusion_flwr.errors import FedFusionError

if TYPE_CHECKING:
    from fedfusion_flwr.data.partition import PartitionSpec

ComponentSizes = Literal["balanced", "long-tailed"]
ComponentTransform = Literal["none", "rotate"]


class PartitionError(FedFusionError, ValueError):
    """A partition that cannot be made of the data; names the key and what is allowed."""


def seeded(seed: int, purpose: str, index: int = 0) -> np.random.Generator:
    """A generator of its own for each seed, purpose and index, independent of all global state."""
    return np.random.default_rng([seed, index, *purpose.encode()])


def plant(
    labels: np.ndarray, num_classes: int, spec: PartitionSpec
) -> tuple[tuple[np.ndarray, ...], np.ndarray, tuple[np.ndarray, ...]]:
    """The fields of a `Partition` of kind ``components``, from labels (N,) in [0, C).

    Raises
    ------
    PartitionError
        If not even one example for each client can be drawn.
    """
    count = spec.planted_components
    sizes = clients_per_component(spec.num_clients, count, spec.component_sizes)
    # Shuffled, so that a client's number says nothing of its component.
    main = seeded(spec.seed, "component-clients").permutation(np.arange(count).repeat(sizes))
    mixtures = draw_mixtures(main, count, spec.component_mixing, spec.seed)
    distributions = class_distributions(
        count, num_classes, shared=spec.component_transform != "none"
    )
    available = np.bincount(labels, minlength=num_classes)
    counts = common_counts(mixtures, distributions, available)
    if counts is None:
        raise PartitionError(
            f"With `num-clients` {spec.num_clients} and `planted-components` {count} the training "
            f"data has too few examples of some class for equal clients: lower `num-clients`."
        )
    indices, components = draw_examples(counts, labels, spec.seed)
    return indices, mixtures, components


def central_components(labels: np.ndarray, num_classes: int, spec: PartitionSpec) -> np.ndarray:
    """The planted component that each central test example is shown under.

    Parameters
    ----------
    labels : np.ndarray
        Labels of the test examples, shape (N,).
    num_classes : int
        C.
    spec : PartitionSpec
        Of kind ``components``.

    Returns
    -------
    np.ndarray
        Shape (N,), int64: uniform over the components that have the example's class.
    """
    if spec.kind != "components":
        raise PartitionError(f"`partition` is {spec.kind!r}; only 'components' has any planted.")
    if spec.component_transform == "none":
        return _owner(labels, spec.planted_components, num_classes)
    rng = seeded(spec.seed, "test-components")
    return rng.integers(spec.planted_components, size=len(labels))


def class_distributions(num_components: int, num_classes: int, *, shared: bool) -> np.ndarray:
    """Q, shape (M, C): what share of component m is class c; rows sum to 1.

    Parameters
    ----------
    num_components, num_classes : int
        M and C; M at most C unless ``shared``.
    shared : bool
        Every component has all classes. Otherwise component m owns the classes c with
        c * M // C = m, so that every class has exactly one component.
    """
    if shared:
        return np.full((num_components, num_classes), 1 / num_classes)
    owner = _owner(np.arange(num_classes), num_components, num_classes)
    owned = (owner == np.arange(num_components)[:, None]).astype(np.float64)
    distributions: np.ndarray = owned / owned.sum(1, keepdims=True)
    return distributions


def clients_per_component(
    num_clients: int, num_components: int, sizes: ComponentSizes
) -> np.ndarray:
    """How many clients have component m as their main one, shape (M,), non-increasing, sum K.

    Long-tailed means that each component has half the clients of the one before, and at least one.
    """
    ratio = 1.0 if sizes == "balanced" else 0.5
    weight = ratio ** np.arange(num_components)
    counts = _largest_remainder(
        num_clients * weight / weight.sum(), num_clients, np.zeros(num_components)
    )
    counts[counts == 0] = 1
    while counts.sum() > num_clients:
        # The last of the largest, so that the sizes stay in order.
        counts[num_components - 1 - int(counts[::-1].argmax())] -= 1
    return counts


def draw_mixtures(main: np.ndarray, num_components: int, mixing: float, seed: int) -> np.ndarray:
    """The clients' mixtures over components, shape (K, M); rows sum to 1.

    Parameters
    ----------
    main : np.ndarray
        Main component of each client, shape (K,).
    num_components : int
        M.
    mixing : float
        0 for one-hot mixtures, else the concentration of the Dirichlet they are drawn from, of
        which the largest entry is moved to the main component.
    seed : int
        Seed of the draw.
    """
    if mixing == 0:
        one_hot: np.ndarray = np.eye(num_components)[main]
        return one_hot
    rng = seeded(seed, "component-mixtures")
    mixtures: np.ndarray = rng.dirichlet(np.full(num_components, mixing), size=len(main))
    rows, largest = np.arange(len(main)), mixtures.argmax(1)
    mixtures[rows, largest], mixtures[rows, main] = (
        mixtures[rows, main],
        mixtures[rows, largest].copy(),
    )
    return mixtures


def common_counts(
    mixtures: np.ndarray, distributions: np.ndarray, available: np.ndarray
) -> np.ndarray | None:
    """How many examples of each component and class every client gets.

    All clients get the same total n, the largest for which there are examples enough without
    drawing any twice.

    Parameters
    ----------
    mixtures : np.ndarray
        Shape (K, M).
    distributions : np.ndarray
        Q, shape (M, C).
    available : np.ndarray
        Examples of each class, shape (C,).

    Returns
    -------
    np.ndarray | None
        Shape (K, M, C), int64; None where not even one example each is possible.
    """
    shares = mixtures[:, :, None] * distributions
    demand = shares.sum((0, 1))
    wanted = demand > 0
    bound = int((available[wanted] / demand[wanted]).min() + 1e-9)
    for size in range(bound, 0, -1):
        # Rounding to whole examples can ask for more of a class than its exact share.
        counts = _whole_counts(shares, size, available)
        if (counts.sum((0, 1)) <= available).all():
            return counts
    return None


def draw_examples(
    counts: np.ndarray, labels: np.ndarray, seed: int
) -> tuple[tuple[np.ndarray, ...], tuple[np.ndarray, ...]]:
    """Draw ``counts`` (K, M, C) examples without replacement.

    Returns
    -------
    tuple[tuple[np.ndarray, ...], tuple[np.ndarray, ...]]
        For each client the sorted indices of its examples, and the component of each.
    """
    num_clients, num_components, num_classes = counts.shape
    chosen: list[list[np.ndarray]] = [[] for _ in range(num_clients)]
    for label in range(num_classes):
        pool = seeded(seed, "component-examples", label).permutation(np.nonzero(labels == label)[0])
        ends = counts[:, :, label].sum(1).cumsum()
        for client, piece in enumerate(np.split(pool[: ends[-1]], ends[:-1])):
            chosen[client].append(piece)
    indices, components = [], []
    for client in range(num_clients):
        drawn = np.concatenate(chosen[client])
        # The order of the draw: by class, and by component within a class.
        component = np.tile(np.arange(num_components), num_classes).repeat(counts[client].T.ravel())
        order = np.argsort(drawn)
        indices.append(drawn[order])
        components.append(component[order])
    return tuple(indices), tuple(components)


def transform_component(
    x: Tensor, component: np.ndarray, num_components: int, kind: ComponentTransform
) -> Tensor:
    """The images as their planted components show them.

    Parameters
    ----------
    x : Tensor
        Images, shape (N, C, H, W).
    component : np.ndarray
        Component of each image, shape (N,), integers in [0, ``num_components``).
    num_components : int
        M.
    kind : ComponentTransform
        ``rotate`` turns the images of component m counterclockwise by m * 360 / M degrees, exactly
        where that is a multiple of 90; the corners that a turn uncovers get the image's darkest
        value. ``none`` changes nothing.

    Returns
    -------
    Tensor
        A new tensor of the same shape, or ``x`` itself for ``none``.

    Raises
    ------
    PartitionError
        If images to be rotated are not square.
    """
    if component.shape != (len(x),):
        raise ValueError(f"component must have shape ({len(x)},), got {component.shape}")
    if kind == "none":
        return x
    if x.shape[2] != x.shape[3]:
        raise PartitionError(
            f"`component-transform` is 'rotate', which needs square images; these are "
            f"{x.shape[2]}x{x.shape[3]}."
        )
    result = x.clone()
    for m in range(1, num_components):
        mask = torch.from_numpy(component == m).to(x.device)
        if mask.any():
            result[mask] = _rotate(x[mask], m, num_components)
    return result


def _owner(labels: np.ndarray, num_components: int, num_classes: int) -> np.ndarray:
    """The only component that has the class, where components differ in their classes."""
    return np.asarray(labels, dtype=np.int64) * num_components // num_classes


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


def _whole_counts(shares: np.ndarray, size: int, available: np.ndarray) -> np.ndarray:
    """Round ``size * shares`` (K, M, C) so that every client has ``size`` examples."""
    num_clients, num_components, num_classes = shares.shape
    counts = np.zeros((num_clients, num_components * num_classes), dtype=np.int64)
    taken = np.zeros(num_classes)
    for client in range(num_clients):
        # Equal remainders go to the class of which the least is taken: otherwise all clients would
        # round the same class up, and exhaust it.
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
