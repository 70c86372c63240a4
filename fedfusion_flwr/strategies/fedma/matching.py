# SPDX-License-Identifier: Apache-2.0
"""Which units of several networks' layers are the same: one layer's matching by BBP-MAP.

Hidden units have no order, so a mean of networks needs one first. FedMA (Wang et al., ICLR 2020)
takes it from PFNM (Yurochkin et al., ICML 2019, arXiv 1905.12022): unit l of client j is a noisy
copy of a global unit, whose number is not fixed. With sigma = sigma_0 = 1, mu_0 = 0, member sums
s_i = sum of the members' rows, c_i members and precisions p_i = 1 + c_i, the gain of putting l

  in global unit i    ||w_l + s_i||^2 / (1 + p_i) - ||s_i||^2 / p_i + log(c_i / (J - c_i))
  in the r-th new one ||w_l||^2 / 2 + 2 log(gamma / J) - 2 log r

(c_i at most 10 in the logarithm) is maximized over a client's injective assignments by the
Hungarian method: first client by client, the widest first, then in sweeps in which every client is
taken out, units that are left without members are deleted, and the client is matched again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Floats = NDArray[np.float64]
Units = NDArray[np.int64]

MAX_POPULARITY = 10
"""More members than this make a unit no more attractive."""

MAX_UNITS = 700
"""A layer this wide offers a client only one new unit; from the authors' code."""


@dataclass(frozen=True)
class Matching:
    """The units of J networks' layers, each in one of L global units.

    Attributes
    ----------
    units : dict[int, NDArray[np.int64]]
        Of each client's network, the global unit of each of its units: (L_j,), all different.
    width : int
        L; max_j L_j <= L <= sum_j L_j, and every global unit has a member.
    """

    units: dict[int, Units]
    width: int

    @property
    def members(self) -> Units:
        """How many networks' units each global unit has, (L,)."""
        return np.bincount(np.concatenate([*self.units.values()]), minlength=self.width)


def match_units(
    descriptors: Mapping[int, Floats],
    *,
    gamma: float,
    sweeps: int,
    generator: np.random.Generator,
    grow: bool = True,
) -> Matching:
    """Match the units of J clients' networks.

    Parameters
    ----------
    descriptors : Mapping[int, NDArray[np.float64]]
        By client, one row for each unit of its network, (L_j, D).
    gamma : float
        Positive; the larger, the sooner a unit becomes a new global one.
    sweeps : int
        How often every network is matched again.
    generator : numpy.random.Generator
        Source of the order of the networks in each sweep.
    grow : bool
        False leaves new units out, unlike the paper: every network gets a permutation of L = L_j
        units.

    Raises
    ------
    ValueError
        If there are no networks, or their rows differ in length; without growth, in number too.
    """
    shapes = {rows.shape if not grow else rows.shape[1:] for rows in descriptors.values()}
    if len(shapes) != 1:
        raise ValueError(f"descriptors of one form are needed, got {sorted(shapes)}")
    run = _Run(descriptors, gamma, grow)
    for client in sorted(descriptors, key=lambda client: -len(descriptors[client])):
        run.insert(client)
    for _ in range(sweeps if len(descriptors) > 1 else 0):
        for client in generator.permutation(list(descriptors)).tolist():
            run.remove(client)
            run.insert(client)
    return Matching({client: run.units[client] for client in descriptors}, len(run.counts))


class _Run:
    """A matching in progress: member sums (L, D), member counts (L,) and assignments."""

    def __init__(self, descriptors: Mapping[int, Floats], gamma: float, grow: bool) -> None:
        self.descriptors, self.gamma, self.grow = descriptors, gamma, grow
        self.sums: Floats = np.zeros((0, next(iter(descriptors.values())).shape[1]))
        self.counts: Units = np.zeros(0, dtype=np.int64)
        self.units: dict[int, Units] = {}

    def insert(self, client: int) -> None:
        rows, width = self.descriptors[client], len(self.counts)
        units = np.arange(len(rows))
        if width:
            slots = new_slots(len(rows), width) if self.grow else 0
            gains = assignment_gains(
                rows, self.sums, self.counts, len(self.descriptors), self.gamma, slots
            )
            # Imported here because clients import this package, too.
            from scipy.optimize import linear_sum_assignment

            _, units = linear_sum_assignment(gains, maximize=True)
        # The slots of new units are alike: number those units in the client's own order.
        fresh = units >= width
        units[fresh] = width + np.arange(fresh.sum())
        self.sums = np.pad(self.sums, ((0, fresh.sum()), (0, 0)))
        self.counts = np.pad(self.counts, (0, fresh.sum()))
        self.sums[units] += rows
        self.counts[units] += 1
        self.units[client] = units

    def remove(self, client: int) -> None:
        units = self.units.pop(client)
        self.sums[units] -= self.descriptors[client]
        self.counts[units] -= 1
        kept = self.counts > 0
        number = np.cumsum(kept) - 1
        self.sums, self.counts = self.sums[kept], self.counts[kept]
        self.units = {other: number[held] for other, held in self.units.items()}


def new_slots(num_rows: int, width: int) -> int:
    """How many new units a client of ``num_rows`` units may add to ``width`` global ones."""
    return max(min(num_rows, max(MAX_UNITS - width, 1)), num_rows - width)


def assignment_gains(
    rows: Floats, sums: Floats, counts: Units, num_clients: int, gamma: float, slots: int
) -> Floats:
    """The gain of every choice that a client's units have, (L_j, L + slots).

    Parameters
    ----------
    rows : NDArray[np.float64]
        w, (L_j, D): the client's units.
    sums, counts : NDArray
        s (L, D) and c (L,) of the other clients, every count from 1 to J - 1.
    num_clients : int
        J, the client included.
    gamma : float
        As in `match_units`.
    slots : int
        Number of new units on offer.
    """
    precision = 1.0 + counts
    row_norms = np.square(rows).sum(1, keepdims=True)
    sum_norms = np.square(sums).sum(1)
    popularity = np.minimum(counts, MAX_POPULARITY)
    match = (row_norms + 2 * rows @ sums.T + sum_norms) / (1 + precision)
    match += np.log(popularity / (num_clients - popularity)) - sum_norms / precision
    order = np.log(np.arange(1, slots + 1))
    new = row_norms / 2 + 2 * np.log(gamma / num_clients) - 2 * order
    return np.hstack([match, new])


def merge_units(
    parts: Sequence[Tensor], units: Sequence[Units], width: int, weights: Tensor | None = None
) -> Tensor:
    """The mean of each global unit's members.

    Parameters
    ----------
    parts : Sequence[Tensor]
        One tensor per network; the first axis runs over the network's units, (L_j, ...).
    units : Sequence[NDArray[np.int64]]
        The global unit of each of them.
    width : int
        L, number of global units, each with a member.
    weights : Tensor or None
        Weight of each network in each global unit, (J, L); every column sums to more than 0
        over the unit's members. None is the plain mean over the members. (The authors' MAP estimate
        s_i / p_i would shrink equal networks, layer after layer.)

    Returns
    -------
    Tensor
        (L, ...), of the parts' type.
    """
    total = torch.zeros((width, *parts[0].shape[1:]), dtype=torch.float64)
    mass = torch.zeros(width, dtype=torch.float64)
    for j, (part, held) in enumerate(zip(parts, units, strict=True)):
        index = torch.from_numpy(held)
        weight = torch.ones(len(held)) if weights is None else weights[j, index]
        total.index_add_(0, index, part.double() * _column(weight.double(), part))
        mass.index_add_(0, index, weight.double())
    return (total / _column(mass, total)).to(parts[0].dtype)


def _column(values: Tensor, like: Tensor) -> Tensor:
    return values.reshape(-1, *[1] * (like.dim() - 1))
