# SPDX-License-Identifier: Apache-2.0
"""From assignments to client weights, and from client models to the global one.

Component mass B_m = sum_k n_k b_km; component model w_m = sum_k (n_k b_km / B_m) w_k; global model
w = sum_m pi_m w_m. Collected per client that is p_k = sum_m pi_m n_k b_km / B_m.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from fedfusion_flwr.fusion.statistics import batchnorm_prefixes

NEGLIGIBLE_SHARE = 1e-6
"""A component with less than this share of the mass counts as absent."""

HALF_A_CLIENT = 0.5


def client_weights(
    assignments: Tensor,
    mixture: Tensor,
    num_examples: Tensor,
) -> Tensor:
    """What each client's model counts in the fused global model.

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
        is renormalized; example weights where none that the mixture values has any.
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
    # A trace of a component must not be blown up to what the mixture gives it; where the mixture
    # gives it no more than its own share, there is nothing to blow up, and FedAvg stays exact.
    modest = pi <= pi.sum() * own_share * (1 + 1e-9)
    present = (mass > 0) & ((own_share > NEGLIGIBLE_SHARE) | modest)
    value = torch.where(present, pi, torch.zeros_like(pi))
    if value.sum() <= 0:
        return example_weights(n)
    value = value / value.sum()
    # Each term in this order makes M = 1 equal example_weights bit for bit.
    share = contribution[:, present] / mass[present]
    return (share * value[present]).sum(1)


def example_weights(num_examples: Tensor) -> Tensor:
    """FedAvg's weights n_k / sum n, shape (K,), float64."""
    n = num_examples.double()
    return n / n.sum()


def cap_weights(weights: Tensor, cap: float) -> Tensor:
    """Limit every weight to ``cap``; what is cut goes to the others in proportion to theirs.

    With fewer than 1 / cap clients the cap cannot be met: then all weights are equal.

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
    if (p <= cap).all():
        return p
    capped = torch.zeros_like(p, dtype=torch.bool)
    while True:
        capped = capped | (p > cap)
        free = p[~capped].sum()
        target = 1 - cap * int(capped.sum())
        scaled = (
            p * (target / free) if free > 0 else torch.full_like(p, target / int((~capped).sum()))
        )
        p = torch.where(capped, torch.full_like(p, cap), scaled)
        if not (p > cap * (1 + 1e-12)).any():
            return p


def prune_assignments(assignments: Tensor) -> Tensor:
    """Empty the components that nobody lives in, and renormalize the rows.

    A soft assignment leaves a trace in every component, which must not pass for a group: a small
    balance exponent would blow it up.

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
    """Which components are somebody's main one or hold at least half a client in all.

    Parameters
    ----------
    assignments : Tensor
        b of some clients, shape (K, M).

    Returns
    -------
    Tensor
        Booleans, shape (M,).
    """
    occupied = assignments.sum(0) >= HALF_A_CLIENT
    occupied[assignments.argmax(1)] = True
    return occupied


def balanced_mixture(component_mass: Tensor, exponent: float) -> Tensor:
    """pi_m proportional to (share of component m)^rho over the occupied components.

    Parameters
    ----------
    component_mass : Tensor
        B, shape (M,), of the population that the mixture should describe.
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
    value = torch.where(share > NEGLIGIBLE_SHARE, share.pow(exponent), torch.zeros_like(share))
    return value / value.sum()


def component_coefficients(assignments: Tensor, num_examples: Tensor) -> Tensor:
    """n_k b_km / B_m, shape (M, K): row m holds the client weights of component model w_m.

    Rows of components without mass are zero.
    """
    contribution = num_examples.double().unsqueeze(1) * assignments.double()
    mass = contribution.sum(0)
    return torch.where(mass > 0, contribution / mass.clamp_min(1e-300), contribution * 0).T


def fuse_state_dicts(
    states: Iterable[Mapping[str, Tensor]], weights: Tensor, *, pool_moments: bool = True
) -> dict[str, Tensor]:
    """Weighted fusion of state dicts, streamed: two float64 models in memory, however many states.

    Parameters and float buffers are averaged. BatchNorm running statistics are fused as moments of
    the mixture, mean = sum p mu, var = sum p (var + mu^2) - mean^2, because averaging variances
    loses the spread between clients. Integer buffers (``num_batches_tracked``) take the maximum.

    Parameters
    ----------
    states : Iterable[Mapping[str, Tensor]]
        One state dict per client, equal keys and shapes; consumed once.
    weights : Tensor
        p, shape (K,), non-negative, sums to 1.
    pool_moments : bool
        False averages running variances like any other tensor, as plain FedAvg implementations do.

    Raises
    ------
    ValueError
        If there are no states, or their number, keys or shapes do not agree.
    """
    accumulator = _Accumulator(pool_moments)
    p = weights.double().tolist()
    count = 0
    for state in states:
        if count >= len(p):
            raise ValueError(f"more states than the {len(p)} weights")
        accumulator.add(state, p[count])
        count += 1
    if count != len(p) or not count:
        raise ValueError(f"{count} states for {len(p)} weights")
    return accumulator.result()


class _Accumulator:
    def __init__(self, pool_moments: bool) -> None:
        self.pool_moments = pool_moments
        self.sums: dict[str, Tensor] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        self.mean_of: dict[str, str] = {}
        self.reference: dict[str, Tensor] = {}
        self.started = False

    def add(self, state: Mapping[str, Tensor], weight: float) -> None:
        if not self.started:
            self.started = True
            self.dtypes = {key: value.dtype for key, value in state.items()}
            if self.pool_moments:
                self.mean_of = {
                    f"{prefix}running_var": f"{prefix}running_mean"
                    for prefix in batchnorm_prefixes(state)
                }
                self.reference = {key: state[key].double() for key in self.mean_of.values()}
        if state.keys() != self.dtypes.keys():
            odd = sorted(state.keys() ^ self.dtypes.keys())
            raise ValueError(f"state dicts differ in their keys: {odd[:3]}")
        for key, value in state.items():
            self._add_one(key, value, state, weight)

    def _add_one(self, key: str, value: Tensor, state: Mapping[str, Tensor], weight: float) -> None:
        known = self.sums.get(key)
        if known is not None and known.shape != value.shape:
            raise ValueError(f"{key}: shape {tuple(value.shape)} differs from {tuple(known.shape)}")
        if not value.is_floating_point():
            self.sums[key] = value.clone() if known is None else torch.maximum(known, value)
            return
        term = value.double()
        if key in self.mean_of:
            # Around a reference near the means: mu^2 alone would drown a small variance.
            mean = self.mean_of[key]
            term = term + (state[mean].double() - self.reference[mean]).square()
        if known is None:
            self.sums[key] = term * weight
        else:
            known.add_(term, alpha=weight)

    def result(self) -> dict[str, Tensor]:
        fused: dict[str, Tensor] = {}
        for key, total in self.sums.items():
            if key in self.mean_of:
                mean = self.mean_of[key]
                total = (total - (self.sums[mean] - self.reference[mean]).square()).clamp_min(0)
            fused[key] = total.to(self.dtypes[key])
        return fused
