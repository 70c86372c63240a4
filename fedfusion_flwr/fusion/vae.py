# SPDX-License-Identifier: Apache-2.0
"""The variational auto-encoder over clients' normalization parameters.

Generative story for K clients, M virtual components and standardized statistics x_k:

    v_m ~ Beta(1, alpha)                    stick-breaking fractions, m = 1..M-1
    pi_m = v_m prod_{j<m} (1 - v_j)         mixture (the last stick takes what is left)
    z_m ~ Normal(0, I)                      latent of component m
    b_k ~ Categorical(pi), relaxed          assignment of client k
    x_k ~ Normal(decode(sum_m b_km z_m), noise_variance * I)

Posterior family: b_k by a Gumbel-softmax of encoder logits (Jang et al. 2017; Maddison et al.
2017), v_m by a Kumaraswamy (Nalisnick & Smyth 2017), z_m by a diagonal Gaussian.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_EULER_GAMMA = 0.5772156649015329
_SERIES_TERMS = 11
_TINY = 1e-6


def sample_gumbel(shape: torch.Size, generator: torch.Generator) -> Tensor:
    """Standard Gumbel noise g = -log(-log u), u ~ Uniform(0, 1)."""
    u = torch.rand(shape, generator=generator).clamp(_TINY, 1 - _TINY)
    return -(-u.log()).log()


def sample_kumaraswamy(a: Tensor, c: Tensor, generator: torch.Generator) -> Tensor:
    """Samples v = (1 - u^(1/c))^(1/a), u ~ Uniform(0, 1): in (0, 1), differentiable in a, c."""
    u = torch.rand(a.shape, generator=generator).clamp(_TINY, 1 - _TINY)
    return (1 - u.pow(1 / c)).clamp(_TINY, 1 - _TINY).pow(1 / a).clamp(_TINY, 1 - _TINY)


def kumaraswamy_mean(a: Tensor, c: Tensor) -> Tensor:
    """E[v] = c B(1 + 1/a, c)."""
    return (c.log() + _log_beta(1 + 1 / a, c)).exp()


def kumaraswamy_beta_kl(a: Tensor, c: Tensor, alpha: float) -> Tensor:
    """KL(Kumaraswamy(a, c) || Beta(1, alpha)), elementwise; Nalisnick & Smyth 2017, eq. 10.

    The infinite series is cut after eleven terms, as the paper suggests; the rest, which matters
    for small c, is replaced by its integral, with B(x, c) ~ Gamma(c) (x + (c - 1) / 2)^-c for
    large x.
    """
    value = (a - 1) / a * (-_EULER_GAMMA - torch.digamma(c) - 1 / c)
    value = value + (a * c).log() + _log_beta(torch.ones_like(a), torch.full_like(a, alpha))
    value = value - (c - 1) / c
    if alpha == 1:  # the series' factor is zero
        return value
    m = torch.arange(1, _SERIES_TERMS + 1, dtype=a.dtype).unsqueeze(-1)
    series = (_log_beta(m / a, c).exp() / (m + a * c)).sum(0)
    start = _SERIES_TERMS + 0.5 + a * c / 2  # the shift that fits both factors
    tail = (c * a.log() + torch.lgamma(c) - c * start.log()).exp() / c
    return value + (alpha - 1) * c * (series + tail)


def stick_breaking(v: Tensor) -> Tensor:
    """Fractions v (M-1,) in (0, 1) -> mixture (M,) that sums to 1."""
    one = v.new_ones(1)
    remaining = torch.cat([one, (1 - v).cumprod(0)])
    return torch.cat([v, one]) * remaining


def categorical_kl(logits: Tensor, log_pi: Tensor) -> Tensor:
    """KL(Categorical(softmax logits_k) || Categorical(pi)) per row of logits (K, M) -> (K,).

    From logits, because the gradient of q log q is infinite where a probability underflows.
    """
    log_q = F.log_softmax(logits, -1)
    return (log_q.exp() * (log_q - log_pi)).sum(-1)


def _log_beta(x: Tensor, y: Tensor) -> Tensor:
    return torch.lgamma(x) + torch.lgamma(y) - torch.lgamma(x + y)


def _mlp(*widths: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for i, (fan_in, fan_out) in enumerate(itertools.pairwise(widths)):
        layers.append(nn.Linear(fan_in, fan_out))
        if i < len(widths) - 2:
            layers.append(nn.ReLU())
    return nn.Sequential(*layers)


@dataclass(frozen=True)
class ElboTerms:
    """The terms of one evidence lower bound, each a scalar in nats, summed over the clients."""

    reconstruction: Tensor
    assignment_kl: Tensor
    latent_kl: Tensor
    stick_kl: Tensor

    def total(self, latent_kl_weight: float) -> Tensor:
        """Reconstruction - KL(b) - weight * KL(z) - KL(v)."""
        return (
            self.reconstruction
            - self.assignment_kl
            - latent_kl_weight * self.latent_kl
            - self.stick_kl
        )


class FusionVAE(nn.Module):
    """Encoder, component latents, sticks and decoder.

    Parameters
    ----------
    num_features : int
        D, the width of a standardized statistics vector.
    num_components : int
        M, at least 2 (with one component there is nothing to infer).
    hidden : tuple[int, ...]
        Encoder widths from the input on; the decoder mirrors them.
    latent : int
        Width of a component's latent z_m.
    alpha : float
        Concentration of the Beta(1, alpha) stick prior; small values prefer few components.
    noise_variance : float
        Observation variance of a standardized feature.
    """

    def __init__(
        self,
        num_features: int,
        num_components: int,
        *,
        hidden: tuple[int, ...],
        latent: int,
        alpha: float,
        noise_variance: float,
    ) -> None:
        super().__init__()
        self.alpha = alpha
        self.noise_variance = noise_variance
        self.encoder = _mlp(num_features, *hidden, num_components)
        self.decoder = _mlp(latent, *reversed(hidden), num_features)
        self.component_mean = nn.Parameter(torch.randn(num_components, latent))
        self.component_log_std = nn.Parameter(torch.full((num_components, latent), -2.0))
        self.log_a = nn.Parameter(torch.zeros(num_components - 1))
        self.log_c = nn.Parameter(torch.zeros(num_components - 1))

    def sticks(self) -> tuple[Tensor, Tensor]:
        """The Kumaraswamy parameters a and c, each (M-1,), kept in [e^-4, e^6]."""
        return self.log_a.clamp(-4, 6).exp(), self.log_c.clamp(-4, 6).exp()

    def mixture(self) -> Tensor:
        """Posterior mean of pi, shape (M,); the sticks are independent, so their means multiply."""
        return stick_breaking(kumaraswamy_mean(*self.sticks()).clamp(_TINY, 1 - _TINY))

    def assignments(self, x: Tensor) -> Tensor:
        """q(b | x), shape (K, M), without noise."""
        return F.softmax(self.encoder(x), dim=-1)

    def component_features(self) -> Tensor:
        """Every component's own decoded statistics, shape (M, D), standardized units."""
        decoded: Tensor = self.decoder(self.component_mean)
        return decoded

    def elbo(
        self, x: Tensor, weights: Tensor, temperature: float, generator: torch.Generator
    ) -> ElboTerms:
        """One-sample estimate of the evidence lower bound.

        Parameters
        ----------
        x : Tensor
            Standardized statistics (K, D).
        weights : Tensor
            Client weights (K,) of mean 1: a client with twice the examples counts twice.
        temperature : float
            tau of the Gumbel-softmax, positive.
        generator : torch.Generator
            Source of all noise.
        """
        logits = self.encoder(x)
        noise = sample_gumbel(logits.shape, generator)
        b = F.softmax((logits + noise) / temperature, dim=-1)
        std = self.component_log_std.clamp(-6, 3).exp()
        z = self.component_mean + std * torch.randn(std.shape, generator=generator)
        a, c = self.sticks()
        log_pi = stick_breaking(sample_kumaraswamy(a, c, generator)).clamp_min(_TINY).log()
        error = (x - self.decoder(b @ z)).square().sum(-1)
        return ElboTerms(
            reconstruction=-(weights * error).sum() / (2 * self.noise_variance),
            assignment_kl=(weights * categorical_kl(logits, log_pi)).sum(),
            latent_kl=0.5 * (self.component_mean.square() + std.square() - 1 - 2 * std.log()).sum(),
            stick_kl=kumaraswamy_beta_kl(a, c, self.alpha).sum(),
        )
