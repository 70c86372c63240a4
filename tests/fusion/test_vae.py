# SPDX-License-Identifier: Apache-2.0
"""Noise, divergence and ELBO of the fusion VAE, and their gradients."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor
from torch.nn import functional as F

from fedfusion_flwr.fusion.vae import ElboTerms, FusionVAE, categorical_kl, sample_gumbel

many = settings(deadline=None, max_examples=60)


def f64(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_gumbel_noise_follows_the_standard_gumbel() -> None:
    noise = sample_gumbel(torch.Size([20_000]), generator(5))
    assert stats.kstest(noise.numpy(), "gumbel_r").pvalue > 1e-3


def test_gumbel_argmax_draws_from_the_softmax() -> None:
    """The Gumbel-max trick: frequencies equal softmax(log 1, log 2, log 5) = (1, 2, 5) / 8."""
    logits = f64(1, 2, 5).log()
    choice = (logits + sample_gumbel(torch.Size([40_000, 3]), generator(6))).argmax(1)
    frequency = torch.bincount(choice, minlength=3) / len(choice)
    torch.testing.assert_close(frequency.double(), f64(1, 2, 5) / 8, rtol=0, atol=0.01)


def test_categorical_divergence_by_hand() -> None:
    """q = (3/4, 1/4) against (1/2, 1/2): log 2 - H(q) = 3/4 log 3/2 + 1/4 log 1/2."""
    logits = np.log([[3.0, 1], [1, 1]])
    found = categorical_kl(logits, np.log([0.5, 0.5]))
    expected = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    np.testing.assert_allclose(found.value, [expected, 0.0], atol=1e-15)
    np.testing.assert_allclose(found.by_log_pi, [[-0.75, -0.25], [-0.5, -0.5]])


@many
@given(st.lists(st.floats(-30, 30), min_size=2, max_size=6), st.integers(0, 100))
def test_categorical_divergence_is_not_negative_and_knows_its_gradient(
    logits: list[float], seed: int
) -> None:
    row = f64(*logits).unsqueeze(0).requires_grad_()
    log_pi = torch.randn(len(logits), generator=generator(seed), dtype=torch.float64)
    log_pi = log_pi.log_softmax(0).requires_grad_()
    value = (row.softmax(1) * (row.log_softmax(1) - log_pi)).sum()
    by_row, by_log_pi = torch.autograd.grad(value, [row, log_pi])
    found = categorical_kl(row.detach().numpy(), log_pi.detach().numpy())
    assert found.value.item() >= -1e-12
    assert found.value.item() == pytest.approx(value.item(), abs=1e-12)
    np.testing.assert_allclose(found.by_logits, by_row, atol=1e-9)
    np.testing.assert_allclose(found.by_log_pi[0], by_log_pi, atol=1e-12)


@pytest.mark.parametrize("size", [1e2, 1e4, 1e30])
def test_categorical_divergence_has_a_finite_gradient_where_probabilities_underflow(
    size: float,
) -> None:
    """q log q computed from underflown probabilities has the gradient log 0."""
    logits = np.array([[size, 0.0, -size]], dtype=np.float32)
    found = categorical_kl(logits, np.full(3, math.log(1 / 3), dtype=np.float32))
    assert found.value.item() == pytest.approx(math.log(3), rel=1e-5)
    assert np.abs(found.by_logits).max() < 1e-5


# --- the VAE --------------------------------------------------------------------------------------


def vae(alpha: float = 1.0, latent_kl_weight: float = 1.0) -> FusionVAE:
    torch.manual_seed(0)
    return FusionVAE(
        6,
        4,
        hidden=(8, 5),
        latent=3,
        alpha=alpha,
        noise_variance=0.5,
        latent_kl_weight=latent_kl_weight,
    )


def test_shapes_of_the_network() -> None:
    network, x = vae(), torch.randn(7, 6, generator=generator())
    torch.testing.assert_close(network.assignments(x).sum(1), torch.ones(7))
    assert network.assignments(x).shape == (7, 4)
    assert network.component_features().shape == (4, 6)


def test_mixture_of_fresh_sticks_halves_from_component_to_component() -> None:
    """a = c = 1: every stick takes 1/2 of what is left."""
    torch.testing.assert_close(vae().mixture(), f64(1 / 2, 1 / 4, 1 / 8, 1 / 8))


def moved(network: FusionVAE, scale: float = 0.3) -> FusionVAE:
    """In double precision, and with parameters that are nobody's beginning."""
    noise = generator(2)
    with torch.no_grad():
        for parameter in network.double().parameters():
            parameter += scale * torch.randn(parameter.shape, generator=noise)
    return network


def written_out(
    network: FusionVAE, x: Tensor, weights: Tensor, temperature: float, clients: int
) -> Tensor:
    """The negative ELBO per client, at the noise of seed 1, for autograd. alpha is 1."""
    noise = generator(1)
    logits = network.encoder(x)
    gumbel = sample_gumbel(logits.shape, noise)
    mean, log_std = network.component_mean, network.component_log_std.clamp(-6, 3)
    z = mean + log_std.exp() * torch.randn(mean.shape, generator=noise)
    u = torch.rand(network.log_a.shape, generator=noise).double()
    a, c = network.log_a.clamp(-4, 6).exp(), network.log_c.clamp(-4, 6).exp()
    v = (1 - u.pow(1 / c)).pow(1 / a)
    log_pi = torch.cat([v.log(), f64(0)]) + torch.cat([f64(0), (1 - v).log().cumsum(0)])
    error = x - network.decoder(((logits + gumbel) / temperature).softmax(1) @ z)
    of_clients = error.square().sum(1) / (2 * network.noise_variance)
    of_clients = of_clients + (logits.softmax(1) * (logits.log_softmax(1) - log_pi)).sum(1)
    latent = torch.distributions.kl_divergence(
        torch.distributions.Normal(mean, log_std.exp()), torch.distributions.Normal(f64(0), f64(1))
    )
    sticks = (a - 1) / a * (-0.5772156649015329 - torch.digamma(c) - 1 / c)
    sticks = sticks + (a * c).log() - (c - 1) / c
    once = network.latent_kl_weight * latent.sum() + sticks.sum()
    return (weights * of_clients).mean() + once / clients


@pytest.mark.parametrize("latent_kl_weight", [1.0, 0.3])
@pytest.mark.parametrize("temperature", [1.0, 0.3])
@pytest.mark.parametrize("clients", [7, 20])
def test_elbo_and_its_gradient_are_those_that_autograd_finds(
    latent_kl_weight: float, temperature: float, clients: int
) -> None:
    network = moved(vae(latent_kl_weight=latent_kl_weight))
    with torch.no_grad():  # two parameters beyond their bounds
        network.component_log_std[0, 0], network.log_c[1] = -7, 6.5
    x = torch.randn(7, 6, generator=generator(), dtype=torch.float64)
    weights = torch.rand(7, generator=generator(4), dtype=torch.float64)
    loss = written_out(network, x, weights, temperature, clients)
    expected = torch.autograd.grad(loss, list(network.parameters()))
    terms = network.elbo(x, weights, temperature, generator(1), clients)
    assert terms.total(latent_kl_weight) == pytest.approx(-loss.item(), rel=1e-9)
    for (name, parameter), gradient in zip(network.named_parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-7, atol=1e-9, msg=name)
    assert network.component_log_std.grad[0, 0] == 0
    assert network.log_c.grad[1] == 0


@pytest.mark.parametrize("alpha", [0.5, 5.0])
def test_gradient_by_the_sticks_is_a_slope_with_any_prior(alpha: float) -> None:
    network, x = moved(vae(alpha=alpha)), torch.randn(7, 6, generator=generator()).double()

    def loss() -> float:
        return -network.elbo(x, torch.ones(7).double(), 0.5, generator(1)).total(1.0)

    loss()
    for parameter in (network.log_a, network.log_c):
        for number, gradient in enumerate(parameter.grad.tolist()):
            ends = []
            for step in (1e-5, -2e-5, 1e-5):
                with torch.no_grad():
                    parameter[number] += step
                ends.append(loss())
            assert gradient == pytest.approx((ends[0] - ends[1]) / 2e-5, rel=1e-4, abs=1e-6)


def test_gradient_of_a_partition_is_that_of_autograd_and_leaves_the_rest_alone() -> None:
    network = moved(vae())
    x = torch.randn(7, 6, generator=generator(), dtype=torch.float64)
    labels, centers = torch.tensor([0, 1, 2, 0, 1, 2, 0]), torch.randn(3, 6, dtype=torch.float64)
    parts = [*network.encoder.parameters(), *network.decoder.parameters(), network.component_mean]
    loss = F.cross_entropy(network.encoder(x), labels)
    loss = loss + F.mse_loss(network.decoder(network.component_mean[:3]), centers)
    expected = torch.autograd.grad(loss, parts)
    network.partition_gradient(x, labels, centers)
    for parameter, gradient in zip(parts, expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)
    assert network.component_log_std.grad is network.log_a.grad is network.log_c.grad is None


@pytest.mark.parametrize("alpha", [0.5, 1.0, 5.0])
@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_gradients_of_the_elbo_are_finite_for_every_parameter(alpha: float, scale: float) -> None:
    network = vae(alpha=alpha)
    x = scale * torch.randn(7, 6, generator=generator())
    network.elbo(x, torch.ones(7), 0.3, generator(1))
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


def test_elbo_terms_of_a_network_that_decodes_zero_by_hand() -> None:
    """Decoder 0: -|x|^2 / (2 * .5) is -3 and 0, weighted -1.5; the weights scale what is summed.

    Each of 4 x 3 latents with mean 0 and variance e costs (e - 1 - 1) / 2; fresh sticks nothing.
    All of it is per client, of whom there are two.
    """
    network = vae()
    with torch.no_grad():
        for parameter in network.decoder.parameters():
            parameter.zero_()
        network.component_mean.zero_()
        network.component_log_std.fill_(0.5)
    x = torch.tensor([[1.0, 1, 1, 0, 0, 0], [0.0] * 6])
    terms = network.elbo(x, torch.tensor([0.5, 1.5]), 1.0, generator())
    assert terms.reconstruction == pytest.approx(-1.5 / 2)
    assert terms.latent_kl == pytest.approx(6 * (math.e - 2) / 2)
    assert terms.stick_kl == pytest.approx(0.0, abs=1e-6)
    assert terms.assignment_kl > 0
    doubled = network.elbo(x, torch.tensor([1.0, 3.0]), 1.0, generator())
    assert doubled.assignment_kl == pytest.approx(2 * terms.assignment_kl)
    of_many = network.elbo(x, torch.tensor([0.5, 1.5]), 1.0, generator(), clients=6)
    assert of_many.reconstruction == terms.reconstruction
    assert of_many.latent_kl == pytest.approx(terms.latent_kl / 3)


def test_total_subtracts_the_divergences() -> None:
    """-10 - 1 - 0.5 * 4 - 3 = -16."""
    assert ElboTerms(-10, 1, 4, 3).total(0.5) == -16
