# SPDX-License-Identifier: Apache-2.0
"""Client weights, mixtures and the fusion of state dicts."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from fedfusion_flwr.fusion import (
    balanced_mixture,
    cap_weights,
    client_weights,
    component_coefficients,
    example_weights,
    inhabited,
    prune_assignments,
)
from fedfusion_flwr.fusion.aggregation import NEGLIGIBLE_SHARE
from tests.fusion.tensors import f64, many

Population = tuple[Tensor, Tensor, Tensor]


@st.composite
def populations(draw: st.DrawFn) -> Population:
    """Assignments (K, M) with rows that sum to 1, a mixture (M,) and example counts (K,)."""
    clients, components = draw(st.integers(1, 12)), draw(st.integers(1, 6))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    sharpness = draw(st.sampled_from([0.1, 1.0, 6.0]))
    noise = torch.randn(clients, components, generator=generator, dtype=torch.float64)
    n = torch.randint(1, 10_000, (clients,), generator=generator).double()
    pi = torch.rand(components, generator=generator, dtype=torch.float64) + 1e-3
    return (sharpness * noise).softmax(1), pi / pi.sum(), n


# --- client_weights -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("b", "pi", "n", "p"),
    [
        # one-hot (0, 0, 1), B = (400, 100): p = (100 / 400 / 2, 300 / 400 / 2, 100 / 100 / 2)
        (f64([1, 0], [1, 0], [0, 1]), f64(1 / 2, 1 / 2), f64(100, 300, 100), [1 / 8, 3 / 8, 1 / 2]),
        # soft, B = (7/2, 1/2): p_1 = 3/4 (1/2) / (7/2) + 1/4 (1/2) / (1/2), p_2 = 3/4 * 6/7
        (f64([0.5, 0.5], [1, 0]), f64(3 / 4, 1 / 4), f64(1, 3), [5 / 14, 9 / 14]),
        # no client in the last component: pi is renormalized to (2/3, 1/3), the first split 1:3
        (
            f64([1, 0, 0], [0, 1, 0], [1, 0, 0]),
            f64(1 / 2, 1 / 4, 1 / 4),
            f64(10, 70, 30),
            [1 / 6, 1 / 3, 1 / 2],
        ),
        # pi is all on an empty component: examples decide
        (f64([1, 0], [1, 0]), f64(0, 1), f64(1, 3), [1 / 4, 3 / 4]),
        # a client of one example among thousands is alone in its component, and stays
        (f64([1, 0], [0, 1]), f64(1 / 2, 1 / 2), f64(9999, 1), [1 / 2, 1 / 2]),
    ],
)
def test_weights_by_hand(b: Tensor, pi: Tensor, n: Tensor, p: list[float]) -> None:
    torch.testing.assert_close(client_weights(b, pi, n), f64(*p), rtol=1e-15, atol=0)


@many
@given(populations())
def test_weights_are_a_distribution(population: Population) -> None:
    p = client_weights(*population)
    assert p.dtype == torch.float64
    assert (p >= 0).all()
    assert abs(float(p.sum()) - 1) < 1e-12


@many
@given(populations())
def test_counts_mixture_is_fedavg_whatever_the_assignments(population: Population) -> None:
    b, _, n = population
    mass = n @ b
    p = client_weights(b, mass / mass.sum(), n)
    torch.testing.assert_close(p, n / n.sum(), rtol=1e-12, atol=1e-12)


@many
@given(st.lists(st.integers(1, 10**7), min_size=1, max_size=50), st.floats(0.01, 1))
def test_one_component_is_fedavg_bit_for_bit(counts: list[int], pi: float) -> None:
    n = torch.tensor(counts)
    p = client_weights(torch.ones(len(counts), 1), torch.tensor([pi]), n)
    assert torch.equal(p, example_weights(n))
    assert p.tolist() == [k / sum(counts) for k in counts]


@many
@given(populations())
def test_identical_assignments_are_fedavg(population: Population) -> None:
    b, pi, n = population
    p = client_weights(b[:1].expand_as(b), pi, n)
    torch.testing.assert_close(p, n / n.sum(), rtol=1e-12, atol=1e-12)


@many
@given(populations(), st.sampled_from([1e-3, 7.0, 1e6]))
def test_scaling_all_example_counts_changes_nothing(population: Population, factor: float) -> None:
    b, pi, n = population
    torch.testing.assert_close(
        client_weights(b, pi, n), client_weights(b, pi, n * factor), rtol=1e-12, atol=1e-15
    )


@many
@given(populations(), st.integers(0, 1000))
def test_order_of_clients_and_components_is_free(population: Population, seed: int) -> None:
    b, pi, n = population
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randperm(b.shape[0], generator=generator)
    columns = torch.randperm(b.shape[1], generator=generator)
    expected = client_weights(b, pi, n)
    close = {"rtol": 1e-12, "atol": 1e-15}
    torch.testing.assert_close(client_weights(b[rows], pi, n[rows]), expected[rows], **close)
    torch.testing.assert_close(client_weights(b[:, columns], pi[columns], n), expected, **close)


@many
@given(
    labels=st.lists(st.integers(0, 3), min_size=4, max_size=12),
    pi=st.lists(st.floats(0.05, 1), min_size=4, max_size=4),
)
def test_a_cohort_is_weighted_to_the_mixture(labels: list[int], pi: list[float]) -> None:
    """One-hot b: sum_k p_k b_km = pi_m, renormalized over the components that took part."""
    b = torch.nn.functional.one_hot(torch.tensor(labels), 4).double()
    n = torch.arange(1, len(labels) + 1).double() ** 2
    value = f64(*pi)
    target = torch.where(b.sum(0) > 0, value, torch.zeros_like(value))
    p = client_weights(b, value / value.sum(), n)
    torch.testing.assert_close(p @ b, target / target.sum(), rtol=1e-12, atol=1e-12)


def test_traces_do_not_make_a_component_inhabited() -> None:
    """Column sums 2.9, 0.4 and 0.7: the second is below half a client and no client's main one."""
    b = f64([0.9, 0.1, 0], [0.9, 0.1, 0], [0.9, 0.1, 0], [0.2, 0.1, 0.7])
    assert inhabited(b).tolist() == [True, False, True]
    assert inhabited(f64([1, 0], [0, 1])).tolist() == [True, True]


def test_guards_of_weights_and_masses() -> None:
    with pytest.raises(ValueError, match="no component has any mass"):
        balanced_mixture(f64(0, 0, 0), 0.5)
    for weights in (f64(10, 10, 1), f64(math.nan, 1)):
        with pytest.raises(ValueError, match="sum to 1"):
            cap_weights(weights, 0.9)


def test_arguments_of_client_weights_are_left_alone() -> None:
    b, pi, n = f64([0.5, 0.5], [1, 0]), f64(0.75, 0.25), f64(1, 3)
    client_weights(b, pi, n)[:] = -1
    assert b.tolist() == [[0.5, 0.5], [1, 0]]
    assert (pi.tolist(), n.tolist()) == ([0.75, 0.25], [1, 3])


@pytest.mark.parametrize(
    ("b", "pi", "n", "message"),
    [
        (torch.ones(2, 3), torch.ones(2), torch.ones(2), "do not fit"),
        (torch.ones(2), torch.ones(2), torch.ones(2), "do not fit"),
        (torch.ones(2, 1), torch.ones(1), torch.zeros(2), "must not be all zero"),
        (torch.ones(2, 1), torch.ones(1), f64(3, -1), "num_examples must be finite and"),
        (f64([1], [float("nan")]), torch.ones(1), torch.ones(2), "assignments must be finite"),
        (torch.ones(2, 1), f64(float("inf")), torch.ones(2), "mixture must be finite"),
    ],
)
def test_bad_arguments_are_named(b: Tensor, pi: Tensor, n: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        client_weights(b, pi, n)


# --- cap_weights ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("weights", "cap", "expected"),
    [
        ([0.5, 0.3, 0.2], 1.0, [0.5, 0.3, 0.2]),
        ([0.5, 0.3, 0.2], 0.5, [0.5, 0.3, 0.2]),
        # .7 -> .4; the free .6 goes 2:1 to .2 and .1, which meets the cap exactly
        ([0.7, 0.2, 0.1], 0.4, [0.4, 0.4, 0.2]),
        # .6 -> .35; the free .65 goes 3:1 -> .4875, .1625; .4875 -> .35; the rest is .3
        ([0.6, 0.3, 0.1], 0.35, [0.35, 0.35, 0.3]),
        # .75 -> .5; the free half goes 3:2 to .15 and .10
        ([0.75, 0.15, 0.10], 0.5, [0.5, 0.3, 0.2]),
        # no other client has any weight: the excess goes to all others equally
        ([1.0, 0.0, 0.0], 0.5, [0.5, 0.25, 0.25]),
        # three clients cannot stay below 1/4 each: all alike
        ([0.7, 0.2, 0.1], 0.25, [1 / 3, 1 / 3, 1 / 3]),
        ([0.9, 0.1], 0.5, [0.5, 0.5]),
        ([1.0], 0.2, [1.0]),
        ([1.0], 1.0, [1.0]),
    ],
)
def test_cap_by_hand(weights: list[float], cap: float, expected: list[float]) -> None:
    torch.testing.assert_close(cap_weights(f64(*weights), cap), f64(*expected))


@many
@given(st.lists(st.integers(0, 1000), min_size=1, max_size=20), st.floats(0.01, 1))
def test_capped_weights_are_a_distribution_below_the_cap_in_the_same_order(
    counts: list[int], cap: float
) -> None:
    n = torch.tensor(counts) + 1
    p = example_weights(n)
    capped = cap_weights(p, cap)
    assert abs(float(capped.sum()) - 1) < 1e-9
    assert float(capped.max()) <= max(cap, 1 / len(p)) * (1 + 1e-9)
    order = p.argsort()
    assert (capped[order].diff() >= -1e-12).all()


@many
@given(st.lists(st.integers(1, 1000), min_size=2, max_size=20), st.floats(0.05, 1))
def test_clients_below_the_cap_keep_their_proportions(counts: list[int], cap: float) -> None:
    p = example_weights(torch.tensor(counts))
    capped = cap_weights(p, cap)
    free = capped < cap * (1 - 1e-9)
    if cap * len(p) > 1 and free.any():
        ratio = capped[free] / p[free]
        torch.testing.assert_close(ratio, ratio[:1].expand_as(ratio), rtol=1e-9, atol=0)
        assert float(ratio[0]) >= 1 - 1e-9


# --- balanced_mixture, component_coefficients -----------------------------------------------------


@pytest.mark.parametrize(
    ("rho", "expected"),
    [
        (1.0, [0.64, 0.36, 0.0]),
        (0.5, [0.8 / 1.4, 0.6 / 1.4, 0.0]),
        (0.0, [0.5, 0.5, 0.0]),
    ],
)
def test_balanced_mixture_by_hand(rho: float, expected: list[float]) -> None:
    """Masses 640, 360, 0: shares .64, .36 with roots .8, .6; an empty component stays empty."""
    torch.testing.assert_close(balanced_mixture(f64(640, 360, 0), rho), f64(*expected))


@many
@given(populations(), st.floats(0, 1))
def test_balancing_keeps_the_order_of_components(population: Population, rho: float) -> None:
    b, _, n = population
    mass = n @ b
    pi = balanced_mixture(mass, rho)
    order = mass.argsort()
    assert abs(float(pi.sum()) - 1) < 1e-12
    assert (pi[order].diff() >= -1e-12).all()
    assert float(pi.max()) <= float(mass.max() / mass.sum()) + 1e-5


def test_uninhabited_components_are_emptied() -> None:
    """Column sums 2.1, .4, .5: the second is no client's main one and below half a client."""
    pruned = prune_assignments(f64([0.6, 0.2, 0.2], [0.8, 0.1, 0.1], [0.7, 0.1, 0.2]))
    expected = f64([3 / 4, 0, 1 / 4], [8 / 9, 0, 1 / 9], [7 / 9, 0, 2 / 9])
    torch.testing.assert_close(pruned, expected)
    single = f64([0.4, 0.35, 0.25])  # the main component stays, however thin
    assert prune_assignments(single).tolist() == [[1, 0, 0]]


def test_component_coefficients_by_hand() -> None:
    """B = (1 * .5 + 3 * 1, 1 * .5, 0): rows (1/7, 6/7), (1, 0) and zeros."""
    found = component_coefficients(f64([0.5, 0.5, 0], [1, 0, 0]), f64(1, 3))
    torch.testing.assert_close(found, f64([1 / 7, 6 / 7], [1, 0], [0, 0]))


@many
@given(populations())
def test_mixing_the_component_models_gives_the_client_weights(population: Population) -> None:
    b, pi, n = population
    mass = n @ b
    assume((mass > NEGLIGIBLE_SHARE * mass.sum()).all())  # what is below is left out of the weights
    mixed = pi @ component_coefficients(b, n)
    expected = client_weights(b, pi, n)
    torch.testing.assert_close(mixed, expected, rtol=1e-12, atol=1e-14)
