# SPDX-License-Identifier: Apache-2.0
"""Densities, entropy, start and ELBO of the fusion VAE."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import integrate, special, stats
from torch import Tensor
from torch.optim import Adam

from fedfusion_flwr.fusion.vae import FusionVAE, dirichlet_log_density, logistic_normal_entropy
from tests.fusion.tensors import f64, generator, many

pytestmark = pytest.mark.rounding


# --- prior and posterior --------------------------------------------------------------------------


@many
@given(st.lists(st.floats(-4, 4), min_size=2, max_size=6), st.floats(0.05, 8))
def test_dirichlet_density_is_scipys_times_the_jacobian(logits: list[float], a: float) -> None:
    """Of b as a function of its log-ratios, the determinant of the derivatives is prod_m b_m."""
    b = special.softmax(logits)
    expected = stats.dirichlet.logpdf(b / b.sum(), np.full(len(b), a)) + np.log(b).sum()
    found = dirichlet_log_density(torch.as_tensor(np.log(b)), torch.tensor(a).double())
    assert found.item() == pytest.approx(expected, rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("a", [0.3, 1.0, 4.0])
def test_dirichlet_density_integrates_to_one_over_the_log_ratio(a: float) -> None:
    def density(h: float) -> float:
        log_b = -np.logaddexp(0, [-h, h])
        return math.exp(dirichlet_log_density(torch.as_tensor(log_b), torch.tensor(a).double()))

    assert integrate.quad(density, -200, 200, points=[0])[0] == pytest.approx(1, abs=1e-6)


@many
@given(st.lists(st.floats(-3, 1.5), min_size=2, max_size=6))
def test_entropy_is_that_of_the_log_ratios(log_std: list[float]) -> None:
    """h_m - h_M has covariance diag(s_1^2, ...) + s_M^2 everywhere."""
    variance = np.exp(2 * np.array(log_std))
    covariance = np.diag(variance[:-1]) + variance[-1]
    expected = stats.multivariate_normal(cov=covariance).entropy()
    assert logistic_normal_entropy(f64(*log_std)).item() == pytest.approx(float(expected), abs=1e-8)


# --- the network ----------------------------------------------------------------------------------


def vae(features: int = 1, components: int = 2) -> FusionVAE:
    torch.manual_seed(0)
    return FusionVAE(features, components, 8)


def constant(network: FusionVAE, mean: list[float], log_std: list[float]) -> None:
    """Let the encoder say the same of every client."""
    with torch.no_grad():
        for parameter in network.encoder.parameters():
            parameter.zero_()
        list(network.encoder.parameters())[-1].copy_(torch.tensor(mean + log_std))


def test_shapes_and_centred_logits() -> None:
    network, x = vae(4, 3), torch.randn(5, 4, generator=generator())
    mean, log_std = network.encode(x, torch.full((5,), 0.1))
    assert mean.shape == log_std.shape == (5, 3)
    torch.testing.assert_close(mean.sum(1), torch.zeros(5), rtol=0, atol=1e-6)
    assert network.elbo(x, torch.zeros(5), 2, generator()).shape == (5,)
    b = network.memberships(x, torch.zeros(5), torch.randn(16, 1, 3, generator=generator()))
    torch.testing.assert_close(b.sum(1), torch.ones(5))


def test_elbo_of_one_client_by_hand() -> None:
    """One draw of b between components -1 and 3, logits (.5, -.5) with deviations 1 and e^-1.

    Noise variance .25 + .75 = 1, so log p(x | b) is the standard normal's at x - b (-1, 3).
    """
    network = vae()
    constant(network, [0.5, -0.5], [0.0, -1.0])
    with torch.no_grad():
        network.components.copy_(torch.tensor([[-1.0], [3.0]]))
        network.log_noise.fill_(math.log(0.5))
        network.log_concentration.fill_(math.log(2.0))
    noise = torch.randn((1, 1, 2), generator=generator(3)).flatten().numpy()
    b = special.softmax([0.5 + noise[0], -0.5 + noise[1] / math.e])
    likelihood = stats.norm.logpdf(0.4 - (3 * b[1] - b[0]))
    prior = stats.beta.logpdf(b[0], 2, 2) + np.log(b).sum()
    entropy = stats.norm(scale=math.sqrt(1 + math.exp(-2))).entropy()
    found = network.elbo(torch.tensor([[0.4]]), torch.tensor([0.75]), 1, generator(3))
    assert found.item() == pytest.approx(likelihood + prior + entropy, abs=1e-5)


def log_evidence(x: float, a: float, variance: float) -> float:
    """Components -1 and 1: b_2 is Beta(a, a) and x normal around 2 b_2 - 1; by quadrature."""

    def joint(h: NDArray[np.float64]) -> NDArray[np.float64]:
        b = special.expit(h)
        prior = a * (special.log_expit(h) + special.log_expit(-h)) - special.betaln(a, a)
        return np.exp(prior + stats.norm.logpdf(x, 2 * b - 1, math.sqrt(variance)))

    grid = np.linspace(-150, 150, 300_001)
    return float(np.log(np.trapezoid(joint(grid), grid)))


@pytest.mark.parametrize(("x", "a"), [(0.0, 0.5), (0.9, 0.5), (-0.5, 2.0)])
def test_elbo_is_a_lower_bound_and_a_close_one_after_a_fit(x: float, a: float) -> None:
    """For any encoder it is below the log evidence; a fitted one comes within .2 nats."""
    network, values, variance = vae(), torch.tensor([[x]]), torch.tensor([0.01])
    with torch.no_grad():
        network.components.copy_(torch.tensor([[-1.0], [1.0]]))
        network.log_noise.fill_(math.log(0.3))
        network.log_concentration.fill_(math.log(a))
    evidence = log_evidence(x, a, 0.3**2 + 0.01)

    def bound() -> tuple[float, float]:
        with torch.no_grad():
            draws = torch.stack(
                [network.elbo(values, variance, 100, generator(seed)) for seed in range(100)]
            )
        return draws.mean().item(), draws.std().item() / 10

    for mean, log_std in ([0.0, 0.0], [0.0, 0.0]), ([1.0, -1.0], [-2.0, 0.5]):
        constant(network, mean, log_std)
        estimate, error = bound()
        assert estimate < evidence + 4 * error
    optimizer, noise = Adam(network.encoder.parameters(), lr=0.03), generator(1)
    for _ in range(400):
        optimizer.zero_grad()
        (-network.elbo(values, variance, 64, noise).sum()).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    estimate, error = bound()
    assert evidence - 0.2 < estimate < evidence + 4 * error


def test_gradients_are_finite_for_every_parameter_and_zero_beyond_the_bounds() -> None:
    network, x = vae(4, 3), 30 * torch.randn(6, 4, generator=generator())
    network.elbo(x, torch.ones(6), 4, generator()).sum().backward()  # type: ignore[no-untyped-call]
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())
    network.zero_grad()
    with torch.no_grad():
        network.log_noise.fill_(5.0)
        network.log_concentration.fill_(-20.0)
    network.elbo(x, torch.ones(6), 4, generator()).sum().backward()  # type: ignore[no-untyped-call]
    assert network.log_noise.grad == network.log_concentration.grad == 0


# --- the start ------------------------------------------------------------------------------------


def mixtures(concentration: float) -> tuple[Tensor, Tensor]:
    rng = np.random.default_rng(0)
    b = torch.as_tensor(rng.dirichlet([concentration] * 3, 40)).float()
    return b, torch.tensor([[0.0, 0], [4, 0], [0, 4]])


def test_the_start_puts_components_and_noise_where_the_memberships_want_them() -> None:
    """x = b z + e, e of standard deviation .2: z is found, and .2."""
    (b, z), network = mixtures(1.0), vae(2, 3)
    x = b @ z + 0.2 * torch.randn(40, 2, generator=generator())
    logits = network.start_at(x, b)
    torch.testing.assert_close(network.components.data, z, rtol=0, atol=0.35)
    assert network.log_noise.exp().item() == pytest.approx(0.2, rel=0.2)
    torch.testing.assert_close(logits.sum(1), torch.zeros(40), rtol=0, atol=1e-5)
    inner = b.min(1).values > 0.02
    torch.testing.assert_close(logits.softmax(1)[inner], b[inner])


@pytest.mark.parametrize(("pure", "expected"), [(True, 0.1), (False, 0.5)])
def test_the_start_expects_pure_clients_only_of_pure_ones(pure: bool, expected: float) -> None:
    (b, z), network = mixtures(1.0), vae(2, 3)
    if pure:
        b = torch.eye(3)[b.argmax(1)]
    network.start_at(b @ z, b)
    assert network.log_concentration.exp().item() == pytest.approx(expected)


def test_distance_is_zero_where_the_encoder_says_what_it_should() -> None:
    """And else the mean squares: logits off by 1 and 1, log deviations off by 2 and 0."""
    network, x, wanted = vae(), torch.zeros(3, 1), torch.tensor([[0.5, -0.5]]).expand(3, 2)
    constant(network, [0.5, -0.5], [-1.0, -1.0])
    assert network.distance(x, torch.zeros(3), wanted).item() == 0
    constant(network, [1.5, -1.5], [1.0, -1.0])
    assert network.distance(x, torch.zeros(3), wanted).item() == pytest.approx(1 + 4 / 2)
