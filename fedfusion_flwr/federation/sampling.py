# SPDX-License-Identifier: Apache-2.0
"""Who trains in a round: seeded draws over client ids, never over Flower's random node ids."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def random_cohort(clients: Sequence[int], size: int, generator: np.random.Generator) -> list[int]:
    """Draw ``size`` clients without replacement; ascending ids."""
    chosen = generator.choice(len(clients), size=min(size, len(clients)), replace=False)
    return sorted(sorted(clients)[i] for i in chosen)


def stratified_cohort(
    clients: Sequence[int],
    size: int,
    component_of: dict[int, int],
    mixture: Sequence[float],
    generator: np.random.Generator,
) -> list[int]:
    """Draw a cohort in which components are represented in proportion to the mixture.

    Clients that were never seen (absent from ``component_of``) come first, until each is known.
    Then each component gets its quota by largest remainder, limited by its members; within a
    component the draw is uniform.

    Parameters
    ----------
    clients : Sequence[int]
        Ids that can train now.
    size : int
        Cohort size.
    component_of : dict[int, int]
        Main component of every known client.
    mixture : Sequence[float]
        pi, shape (M,), non-negative.
    generator : numpy.random.Generator
        Source of the draw.
    """
    size = min(size, len(clients))
    unknown = [c for c in clients if c not in component_of]
    cohort = random_cohort(unknown, size, generator) if unknown else []
    members: dict[int, list[int]] = {}
    for client in sorted(clients):
        if client in component_of:
            members.setdefault(component_of[client], []).append(client)
    quotas = largest_remainder(
        [mixture[m] if m in members else 0.0 for m in range(len(mixture))],
        size - len(cohort),
        [len(members.get(m, [])) for m in range(len(mixture))],
    )
    for component, quota in enumerate(quotas):
        if quota:
            cohort += random_cohort(members[component], quota, generator)
    return sorted(cohort)


def largest_remainder(shares: Sequence[float], total: int, limits: Sequence[int]) -> list[int]:
    """Whole numbers in proportion to ``shares`` that sum to ``total``, none above its limit.

    What a limit cuts off is divided among the others; of equal remainders the lower index wins.
    """
    quotas = [0] * len(shares)
    while (left := total - sum(quotas)) > 0:
        open_ = [m for m, q in enumerate(quotas) if q < limits[m]]
        if not open_:
            break
        weight = np.array([shares[m] for m in open_], dtype=np.float64)
        weight = weight / weight.sum() if weight.sum() > 0 else np.full(len(open_), 1 / len(open_))
        exact = weight * left
        whole = np.floor(exact + 1e-9).astype(int)
        order = np.argsort(-(exact - whole), kind="stable")
        whole[order[: left - int(whole.sum())]] += 1
        for m, extra in zip(open_, whole.tolist(), strict=True):
            quotas[m] = min(limits[m], quotas[m] + extra)
    return quotas
