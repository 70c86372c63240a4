# SPDX-License-Identifier: Apache-2.0
"""Noise, sticks, divergences and ELBO of the fusion VAE."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import integrate, special, stats

from fedfusion_flwr.fusion.vae import (
    TINY,
    ElboTerms,
    FusionVAE,
    categorical_kl,
    kumaraswamy_beta_kl,
    kumaraswamy_mean,
    sample_gumbel,
    sample_kumaraswamy,
    stick_breaking,
)
from tests.fusion.tensors import f64, generator, many

SERIES_TERMS = 11


# --- assignments ----------------------------------------------------------------------------------


def test_gumbel_noise_follows_the_standard_gumbel() -> None:
    noise = sample_gumbel((20_000,), generator(5))
    assert stats.kstest(noise.numpy(), "gumbel_r").pvalue > 1e-3


def test_gumbel_argmax_draws_from_the_softmax() -> None:
    """The Gumbel-max trick: frequencies equal softmax(log 1, log 2, log 5) = (1, 2, 5) / 8."""
    logits = f64(1, 2, 5).log()
    choice = (logits + sample_gumbel((40_000, 3), generator(6))).argmax(1)
    frequency = torch.bincount(choice, minlength=3) / len(choice)
    torch.testing.assert_close(frequency.double(), f64(1, 2, 5) / 8, rtol=0, atol=0.01)


def test_categorical_divergence_by_hand() -> None:
    """q = (3/4, 1/4) against (1/2, 1/2): log 2 - H(q) = 3/4 log 3/2 + 1/4 log 1/2."""
    logits = torch.tensor([[3.0, 1], [1, 1]], dtype=torch.float64).log()
    expected = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    found = categorical_kl(logits, f64(0.5, 0.5).log())
    torch.testing.assert_close(found, f64(expected, 0), rtol=0, atol=1e-15)


@many
@given(st.lists(st.floats(-30, 30), min_size=2, max_size=6), st.integers(0, 100))
def test_categorical_divergence_is_never_negative(logits: list[float], seed: int) -> None:
    log_pi = torch.randn(len(logits), generator=generator(seed)).double().log_softmax(0)
    assert categorical_kl(f64(*logits).unsqueeze(0), log_pi).item() >= -1e-12


@pytest.mark.parametrize("size", [1e2, 1e4, 1e30])
def test_categorical_divergence_has_a_finite_gradient_where_probabilities_underflow(
    size: float,
) -> None:
    """q log q computed from underflown probabilities has the gradient log 0."""
    logits = torch.tensor([[size, 0.0, -size]], requires_grad=True)
    found = categorical_kl(logits, torch.full((3,), 1 / 3).log())
    (gradient,) = torch.autograd.grad(found.sum(), logits)
    assert found.item() == pytest.approx(math.log(3), rel=1e-5)
    assert float(gradient.abs().max()) < 1e-5


# --- sticks ---------------------------------------------------------------------------------------


def test_kumaraswamy_mean_where_it_has_a_closed_form() -> None:
    """a = 1: the mean of Beta(1, c), 1 / (1 + c). c = 1: the mean of Beta(a, 1), a / (a + 1)."""
    c, one = f64(0.05, 1, 3, 100), torch.ones(4, dtype=torch.float64)
    torch.testing.assert_close(kumaraswamy_mean(one, c), 1 / (1 + c), rtol=1e-12, atol=0)
    torch.testing.assert_close(kumaraswamy_mean(c, one), c / (1 + c), rtol=1e-12, atol=0)


@pytest.mark.parametrize(("a", "c"), [(0.5, 0.5), (2.0, 5.0), (4.0, 0.7), (1.0, 1.0)])
def test_kumaraswamy_samples_follow_the_distribution(a: float, c: float) -> None:
    """F(v) = 1 - (1 - v^a)^c; the sample mean is within four standard errors of the mean."""
    draws = sample_kumaraswamy(f64(a).expand(20_000), f64(c).expand(20_000), generator(1)).numpy()
    assert stats.kstest(draws, lambda v: 1 - (1 - v**a) ** c).pvalue > 1e-3
    error = 4 * draws.std() / math.sqrt(len(draws))
    assert draws.mean() == pytest.approx(kumaraswamy_mean(f64(a), f64(c)).item(), abs=error)


@pytest.mark.parametrize("log_a", [-4.0, 6.0])
def test_extreme_sticks_stay_inside_the_unit_interval(log_a: float) -> None:
    """(e^-4, e^6) and (e^6, e^-4), the bounds of the parameters. A clamped sample is a constant."""
    a = torch.full((5000,), log_a).exp().requires_grad_()
    c = torch.full((5000,), 2 - log_a).exp().requires_grad_()
    draws = sample_kumaraswamy(a, c, generator())
    assert ((draws > 0) & (draws < 1)).all()
    clamped = (draws == TINY) | (draws == 1 - TINY)
    assert clamped.any()
    for gradient in torch.autograd.grad(draws.sum(), [a, c]):
        assert gradient.isfinite().all()
        assert not gradient[clamped].any()


def kl_by_quadrature(a: float, c: float, alpha: float) -> float:
    """E_q[log q - log p] with v = (1 - e^(-l / c))^(1 / a), l ~ Exponential(1)."""

    def integrand(level: float) -> float:
        log_v = (
            np.log1p(-np.exp(-level / c)) / a if level > c else np.log(-np.expm1(-level / c)) / a
        )
        log_q = np.log(a * c) + (a - 1) * log_v - (c - 1) * level / c
        log_p = -special.betaln(1, alpha) + (alpha - 1) * np.log(-np.expm1(log_v))
        return float(np.exp(-level) * (log_q - log_p))

    pieces = ((1e-300, 1e-6), (1e-6, 1e-2), (1e-2, 1), (1, 10), (10, 30))
    return math.fsum(integrate.quad(integrand, *piece, limit=200)[0] for piece in pieces)


def truncated_part(a: float, c: float, alpha: float) -> float:
    """What the series leaves out: (alpha - 1) c sum_{m > 11} B(m / a, c) / (m + a c)."""
    m = np.arange(SERIES_TERMS + 1, 1_000_000)
    tail = np.exp(special.betaln(m / a, c)) / (m + a * c)
    return (alpha - 1) * c * float(tail.sum())


def kl(a: float, c: float, alpha: float) -> float:
    return kumaraswamy_beta_kl(f64(a), f64(c), alpha).item()


def test_uniform_prior_by_hand() -> None:
    """Kumaraswamy(1, c) is Beta(1, c): KL to the uniform is log c - (c - 1) / c, 0 at c = 1."""
    for c in (0.25, 1.0, 2.0, 40.0):
        assert kl(1.0, c, 1.0) == pytest.approx(math.log(c) - (c - 1) / c, rel=1e-12, abs=1e-15)


@pytest.mark.parametrize("a", [0.3, 1.0, 3.0])
@pytest.mark.parametrize("c", [0.5, 3.0, 20.0])
def test_divergence_from_the_uniform_prior_is_exact(a: float, c: float) -> None:
    """alpha = 1 needs no series."""
    assert kl(a, c, 1.0) == pytest.approx(kl_by_quadrature(a, c, 1.0), abs=1e-6)


@pytest.mark.parametrize(("a", "c"), [(0.5, 2.0), (1.0, 2.0), (1.0, 5.0), (2.0, 3.0)])
@pytest.mark.parametrize("alpha", [0.5, 2.0, 5.0])
def test_integral_stands_in_for_the_truncated_series(a: float, c: float, alpha: float) -> None:
    """It leaves less than a quarter of the error of cutting after eleven terms."""
    left = abs(kl(a, c, alpha) - kl_by_quadrature(a, c, alpha))
    assert left <= 0.25 * abs(truncated_part(a, c, alpha)) + 1e-4


def test_small_sticks_by_hand() -> None:
    """Kumaraswamy(1, c) is Beta(1, c), and KL(Beta(1, c) || Beta(1, s)) = log(c/s) + s/c - 1.

    At c = 0.3, s = 5: log 0.06 + 16.667 - 1 = 12.853; cutting the series alone gave 7.1.
    """
    assert kl(1.0, 0.3, 5.0) == pytest.approx(math.log(0.06) + 5 / 0.3 - 1, rel=0.01)


@many
@given(st.floats(0.02, 50), st.floats(0.02, 50))
def test_divergence_from_the_default_prior_is_never_negative(a: float, c: float) -> None:
    assert kl(a, c, 1.0) >= -1e-9


def test_stick_breaking_by_hand() -> None:
    """v = (1/2, 1/4): 1/2, then 1/4 of the rest, then what is left: (1/2, 1/8, 3/8)."""
    assert stick_breaking(f64(0.5, 0.25)).tolist() == [0.5, 0.125, 0.375]
    assert stick_breaking(f64()).tolist() == [1.0]


@many
@given(st.lists(st.floats(1e-6, 1 - 1e-6), max_size=20))
def test_stick_breaking_gives_a_distribution(fractions: list[float]) -> None:
    pi = stick_breaking(f64(*fractions))
    assert pi.shape == (len(fractions) + 1,)
    assert float(pi.min()) >= 0
    assert float(pi.sum()) == pytest.approx(1, abs=1e-12)


# --- the VAE --------------------------------------------------------------------------------------


def vae(alpha: float = 1.0) -> FusionVAE:
    torch.manual_seed(0)
    return FusionVAE(6, 4, hidden=(8, 5), latent=3, alpha=alpha, noise_variance=0.5)


def test_shapes_of_the_network() -> None:
    network, x = vae(), torch.randn(7, 6, generator=generator())
    torch.testing.assert_close(network.assignments(x).sum(1), torch.ones(7))
    assert network.assignments(x).shape == (7, 4)
    assert network.component_features().shape == (4, 6)


def test_mixture_of_fresh_sticks_halves_from_component_to_component() -> None:
    """a = c = 1: every stick takes 1/2 of what is left."""
    torch.testing.assert_close(vae().mixture(), torch.tensor([1 / 2, 1 / 4, 1 / 8, 1 / 8]))


def test_elbo_terms_of_a_network_that_decodes_zero_by_hand() -> None:
    """Decoder 0: -|x|^2 / (2 * .5) is -3 and 0, weighted -1.5; the weights scale what is summed.

    Each of 4 x 3 latents with mean 0 and variance e costs (e - 1 - 1) / 2; fresh sticks nothing.
    All of it is per client, and there are two.
    """
    network = vae()
    with torch.no_grad():
        for parameter in network.decoder.parameters():
            parameter.zero_()
        network.component_mean.zero_()
        network.component_log_std.fill_(0.5)
    x = torch.tensor([[1.0, 1, 1, 0, 0, 0], [0.0] * 6])

    def terms(first: float, second: float, clients: int | None = None) -> list[float]:
        found = network.elbo(x, torch.tensor([first, second]), 1.0, generator(), clients)
        return [term.item() for term in found]

    reconstruction, assignment_kl, latent_kl, stick_kl = terms(0.5, 1.5)
    assert reconstruction == pytest.approx(-1.5 / 2)
    assert latent_kl == pytest.approx(6 * (math.e - 2) / 2)
    assert stick_kl == pytest.approx(0.0, abs=1e-6)
    assert assignment_kl > 0
    assert terms(1.0, 3.0)[1] == pytest.approx(2 * assignment_kl)
    of_many = terms(0.5, 1.5, clients=6)
    assert of_many[:2] == [reconstruction, assignment_kl]
    assert of_many[2] == pytest.approx(latent_kl / 3)


def test_a_certain_client_is_reconstructed_by_its_component() -> None:
    """Component 2 beyond doubt, at cold temperature: -|x - decoded|^2 / (2 * .5), KL -log pi_2."""
    network, x = vae(), torch.randn(1, 6, generator=generator())
    with torch.no_grad():
        network.encoder[-1].weight.zero_()
        network.encoder[-1].bias.copy_(100 * torch.eye(4)[2])
        network.component_log_std.fill_(-6)
    found = network.elbo(x, torch.ones(1), 0.1, generator(1))
    error = (x - network.component_features()[2]).square().sum()
    assert found.reconstruction.item() == pytest.approx(-error.item(), rel=0.01)
    noise = generator(1)
    sample_gumbel((1, 4), noise)
    torch.randn(4, 3, generator=noise)
    pi = stick_breaking(sample_kumaraswamy(torch.ones(3), torch.ones(3), noise))
    assert found.assignment_kl.item() == pytest.approx(-pi[2].log().item(), rel=1e-5)


def test_total_subtracts_the_divergences() -> None:
    """-10 - 1 - 0.5 * 4 - 3 = -16."""
    assert ElboTerms(*f64(-10, 1, 4, 3)).total(0.5) == -16


@pytest.mark.parametrize("alpha", [0.5, 1.0, 5.0])
@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_gradients_of_the_elbo_are_finite_for_every_parameter(alpha: float, scale: float) -> None:
    network = vae(alpha)
    x = scale * torch.randn(7, 6, generator=generator())
    network.elbo(x, torch.ones(7), 0.3, generator(1)).total(1.0).backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


def test_parameters_beyond_their_bounds_have_no_gradient() -> None:
    network, x = vae(), torch.randn(7, 6, generator=generator())
    with torch.no_grad():
        network.component_log_std[0, 0], network.log_c[1], network.log_a[0] = -7, 6.5, -4.5
    network.elbo(x, torch.ones(7), 0.5, generator(1)).total(1.0).backward()
    assert network.component_log_std.grad[0].tolist()[0] == 0
    assert network.component_log_std.grad[0, 1:].all()
    assert network.log_c.grad.bool().tolist() == [True, False, True]
    assert network.log_a.grad.bool().tolist() == [False, True, True]


def test_loss_of_a_partition_by_hand_and_what_it_leaves_alone() -> None:
    """An encoder of equal logits costs log 4; a decoder of zeros the centres' mean square, 2."""
    network, x = vae(), torch.randn(4, 6, generator=generator())
    with torch.no_grad():
        for layer in (network.encoder[-1], network.decoder[-1]):
            layer.weight.zero_()
            layer.bias.zero_()
    centers = torch.tensor([[1.0] * 6, [-1.0] * 6, [2.0] * 6])
    loss = network.partition_loss(x, torch.tensor([0, 1, 2, 0]), centers)
    assert loss.item() == pytest.approx(math.log(4) + 2)
    loss.backward()
    assert network.component_log_std.grad is network.log_a.grad is network.log_c.grad is None
    network = vae()
    network.partition_loss(x, torch.tensor([0, 1, 2, 0]), centers).backward()
    assert network.component_mean.grad.any(1).tolist() == [True, True, True, False]
