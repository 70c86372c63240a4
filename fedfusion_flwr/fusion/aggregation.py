# SPDX-License-Identifier: Apache-2.0
"""From assignments to client weights.

Component mass B_m = sum_k n_k b_km; component model w_m = sum_k (n_k b_km / B_m) w_k; global model
w = sum_m pi_m w_m. Collected per client that is p_k = sum_m pi_m n_k b_km / B_m.
"""

from __future__ import annotations

import torch
from torch import Tensor

NEGLIGIBLE_SHARE = 1e-6
"""A component with less than this share of the mass counts as absent."""


def client_weights(assignments: Tensor, mixture: Tensor, num_examples: Tensor) -> Tensor:
    """Weight of each client's model in the fused global model.

    With ``mixture`` equal to the shares of mass B_m / sum_j B_j this is FedAvg, whatever the
    assignments are: the method differs from FedAvg only through the mixture.

    Parameters
    ----------
    assignments : Tensor
        b, shape (K, M), non-negative.
    mixture : Tensor
        pi, shape (M,), non-negative.
    num_examples : Tensor
        n, shape (K,), non-negative, not all zero.

    Returns
    -------
    Tensor
        p, shape (K,), float64, non-negative, sums to 1. Components without mass are left out and pi
        is renormalized; if no component with a place in the mixture has mass, example weights.

    Raises
    ------
    ValueError
        If shapes do not fit, a value is negative or not finite, or all examples are zero.
    """
    b, pi, n = assignments.double(), mixture.double(), num_examples.double()
    if b.dim() != 2 or n.shape != b.shape[:1] or pi.shape != b.shape[1:]:
        raise ValueError(
            f"assignments {tuple(b.shape)}, mixture {tuple(pi.shape)} and examples "
            f"{tuple(n.shape)} do not fit (K, M), (M,), (K,)"
        )
    for name, value in (("assignments", b), ("mixture", pi), ("num_examples", n)):
        if not value.isfinite().all() or (value < 0).any():
            raise ValueError(f"{name} must be finite and non-negative")
    if n.sum() <= 0:
        raise ValueError("num_examples must not be all zero")
    contribution = n.unsqueeze(1) * b
    mass = contribution.sum(0)
    own_share = mass / mass.sum()
    # A trace of a component must not be blown up to its place in the mixture. Where that is no
    # more than its own share nothing is blown up, and FedAvg stays exact.
    modest = pi <= pi.sum() * own_share * (1 + 1e-9)
    present = (mass > 0) & ((own_share > NEGLIGIBLE_SHARE) | modest)
    value = pi * present
    if value.sum() <= 0:
        return example_weights(n)
    value = value / value.sum()
    # In this order of operations M = 1 equals example_weights bit for bit.
    share = contribution[:, present] / mass[present]
    return (share * value[present]).sum(1)


def example_weights(num_examples: Tensor) -> Tensor:
    """FedAvg's weights n_k / sum n, shape (K,), float64."""
    n = num_examples.double()
    return n / n.sum()


def cap_weights(weights: Tensor, cap: float) -> Tensor:
    """Limit every weight to ``cap``, and share the excess among the others in proportion.

    With fewer than 1 / cap clients no weights meet the cap; then all are equal.

    Raises
    ------
    ValueError
        If the weights are not finite, negative or do not sum to 1.
    """
    p = weights.double()
    if not p.isfinite().all() or (p < 0).any() or abs(float(p.sum()) - 1) > 1e-6:
        raise ValueError(f"weights must be non-negative and sum to 1, got {p.tolist()[:5]}")
    if cap * len(p) <= 1:
        return torch.full_like(p, 1 / len(p)) if cap < 1 else p
    capped = torch.zeros_like(p, dtype=torch.bool)
    while (p > cap * (1 + 1e-12)).any():
        capped |= p > cap
        free = p * ~capped if p[~capped].any() else (~capped).double()
        left = 1 - cap * int(capped.sum())
        p = torch.where(capped, cap, free * (left / free.sum()))
    return p


def prune_assignments(assignments: Tensor) -> Tensor:
    """Empty the components that are not `inhabited`, and renormalize the rows.

    A soft assignment leaves a trace in every component. A trace is not a group, and a small balance
    exponent would blow it up to one.

    Parameters
    ----------
    assignments : Tensor
        b of the whole population, shape (K, M), rows sum to 1.

    Returns
    -------
    Tensor
        The same shape, float64, rows sum to 1.
    """
    kept = assignments.double() * inhabited(assignments)
    return kept / kept.sum(1, keepdim=True)


def inhabited(assignments: Tensor) -> Tensor:
    """Which components are some client's main one or hold at least half a client in all.

    Parameters
    ----------
    assignments : Tensor
        b of some clients, shape (K, M).

    Returns
    -------
    Tensor
        Booleans, shape (M,).
    """
    occupied = assignments.sum(0) >= 0.5
    occupied[assignments.argmax(1)] = True
    return occupied


def balanced_mixture(component_mass: Tensor, exponent: float) -> Tensor:
    """pi_m proportional to (share of component m)^rho over the occupied components.

    Parameters
    ----------
    component_mass : Tensor
        B, shape (M,), of the population that the mixture is to describe.
    exponent : float
        rho in [0, 1]: 1 keeps the shares (FedAvg under full participation), 0 counts every
        occupied component the same.

    Raises
    ------
    ValueError
        If no component has any mass.
    """
    mass = component_mass.double()
    if not mass.sum() > 0:
        raise ValueError("no component has any mass")
    share = mass / mass.sum()
    value = share.pow(exponent) * (share > NEGLIGIBLE_SHARE)
    return value / value.sum()


def component_coefficients(assignments: Tensor, num_examples: Tensor) -> Tensor:
    """n_k b_km / B_m, shape (M, K): row m holds the client weights of component model w_m.

    Rows of components without mass are zero.
    """
    contribution = num_examples.double().unsqueeze(1) * assignments.double()
    mass = contribution.sum(0)
    return torch.where(mass > 0, contribution / mass.clamp_min(1e-300), contribution * 0).T
