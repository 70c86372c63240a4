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
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

TINY = 1e-6
"""Uniform noise and stick fractions stay this far from 0 and 1."""

_EULER_GAMMA = 0.5772156649015329
_SERIES_TERMS = 11
_LOG_STD = (-6.0, 3.0)
_LOG_STICK = (-4.0, 6.0)


def sample_gumbel(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Standard Gumbel noise g = -log(-log u), u ~ Uniform(0, 1)."""
    return -(-_inside(torch.rand(shape, generator=generator)).log()).log()


def sample_kumaraswamy(a: Tensor, c: Tensor, generator: torch.Generator) -> Tensor:
    """Samples v = (1 - u^(1/c))^(1/a), u ~ Uniform(0, 1), differentiable in a and c."""
    u = _inside(torch.rand(a.shape, generator=generator))
    return _inside(_inside(1 - u.pow(1 / c)).pow(1 / a))


def kumaraswamy_mean(a: Tensor, c: Tensor) -> Tensor:
    """E[v] = c B(1 + 1/a, c)."""
    return c * _log_beta(1 + 1 / a, c).exp()


def kumaraswamy_beta_kl(a: Tensor, c: Tensor, alpha: float) -> Tensor:
    """KL(Kumaraswamy(a, c) || Beta(1, alpha)), elementwise; Nalisnick & Smyth 2017, eq. 10.

    The infinite series is cut after eleven terms, as the paper suggests. Its tail, which matters
    for small c, is replaced by an integral, with B(x, c) ~ Gamma(c) (x + (c - 1) / 2)^-c for
    large x.
    """
    value = (a - 1) / a * (-_EULER_GAMMA - torch.digamma(c) - 1 / c)
    value = value + (a * c / alpha).log() - (c - 1) / c
    if alpha == 1:  # the factor of the series is zero
        return value
    m = torch.arange(1, _SERIES_TERMS + 1).unsqueeze(1)
    series = (_log_beta(m / a, c).exp() / (m + a * c)).sum(0)
    start = _SERIES_TERMS + 0.5 + a * c / 2  # the shift that fits both factors
    tail = (c * (a / start).log() + torch.lgamma(c)).exp() / c
    return value + (alpha - 1) * c * (series + tail)


def stick_breaking(v: Tensor) -> Tensor:
    """Fractions v (M-1,) in (0, 1) -> mixture (M,) that sums to 1."""
    one = v.new_ones(1)
    return torch.cat([v, one]) * torch.cat([one, (1 - v).cumprod(0)])


def categorical_kl(logits: Tensor, log_pi: Tensor) -> Tensor:
    """KL(Categorical(softmax logits_k) || Categorical(pi)) per row of logits (K, M) -> (K,).

    From logits, because q log q has no finite gradient where a probability q underflows.
    """
    log_q = F.log_softmax(logits, -1)
    return (log_q.exp() * (log_q - log_pi)).sum(-1)


class ElboTerms(NamedTuple):
    """The terms of the evidence lower bound: scalars, in nats per client."""

    reconstruction: Tensor
    assignment_kl: Tensor
    latent_kl: Tensor
    stick_kl: Tensor

    def total(self, latent_kl_weight: float) -> Tensor:
        """Reconstruction - KL(b) - weight * KL(z) - KL(v)."""
        divergence = self.assignment_kl + latent_kl_weight * self.latent_kl + self.stick_kl
        return self.reconstruction - divergence


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
        self.num_features = num_features
        self.alpha = alpha
        self.noise_variance = noise_variance
        self.encoder = _perceptron(num_features, *hidden, num_components)
        self.decoder = _perceptron(latent, *reversed(hidden), num_features)
        self.component_mean = nn.Parameter(torch.randn(num_components, latent))
        self.component_log_std = nn.Parameter(torch.full((num_components, latent), -2.0))
        self.log_a = nn.Parameter(torch.zeros(num_components - 1))
        self.log_c = nn.Parameter(torch.zeros(num_components - 1))

    def sticks(self) -> tuple[Tensor, Tensor]:
        """The Kumaraswamy parameters a and c, each (M-1,), in [e^-4, e^6]."""
        return self.log_a.clamp(*_LOG_STICK).exp(), self.log_c.clamp(*_LOG_STICK).exp()

    def mixture(self) -> Tensor:
        """Posterior mean of pi, shape (M,); the sticks are independent, so their means multiply."""
        return stick_breaking(_inside(kumaraswamy_mean(*self.sticks())))

    def assignments(self, x: Tensor) -> Tensor:
        """q(b | x), shape (K, M), without noise."""
        return F.softmax(self.encoder(x), -1)

    def component_features(self) -> Tensor:
        """Every component's own decoded statistics, shape (M, D), standardized units."""
        decoded: Tensor = self.decoder(self.component_mean)
        return decoded

    def partition_loss(self, x: Tensor, labels: Tensor, centers: Tensor) -> Tensor:
        """How far the network is from a partition of clients x (K, D) into G groups, G at most M.

        Mean cross entropy of the encoder against the clients' labels (K,), plus mean squared
        distance of the first G components' decoded statistics from the groups' centres (G, D).
        """
        decoded = self.decoder(self.component_mean[: len(centers)])
        return F.cross_entropy(self.encoder(x), labels) + F.mse_loss(decoded, centers)

    def elbo(
        self,
        x: Tensor,
        weights: Tensor,
        temperature: float,
        generator: torch.Generator,
        clients: int | None = None,
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
        clients : int, optional
            Number of clients that these are a sample of, who share the divergences of components
            and sticks; K by default.
        """
        logits = self.encoder(x)
        b = F.softmax((logits + sample_gumbel(logits.shape, generator)) / temperature, -1)
        mean, log_std = self.component_mean, self.component_log_std.clamp(*_LOG_STD)
        std = log_std.exp()
        z = mean + std * torch.randn(std.shape, generator=generator)
        squared_error = (x - self.decoder(b @ z)).square().sum(-1)

        a, c = self.sticks()
        pi = stick_breaking(sample_kumaraswamy(a, c, generator))
        assignment_kl = categorical_kl(logits, pi.clamp_min(TINY).log())
        latent_kl = (mean.square() + std.square() - 1 - 2 * log_std).sum() / 2
        stick_kl = kumaraswamy_beta_kl(a, c, self.alpha).sum()

        clients = clients or len(x)
        return ElboTerms(
            reconstruction=-(weights @ squared_error) / (2 * self.noise_variance * len(x)),
            assignment_kl=weights @ assignment_kl / len(x),
            latent_kl=latent_kl / clients,
            stick_kl=stick_kl / clients,
        )


def _perceptron(*widths: int) -> nn.Sequential:
    """Linear layers with ReLU between them."""
    layers: list[nn.Module] = []
    for fan_in, fan_out in itertools.pairwise(widths):
        layers += [nn.Linear(fan_in, fan_out), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def _inside(values: Tensor) -> Tensor:
    return values.clamp(TINY, 1 - TINY)


def _log_beta(x: Tensor, y: Tensor) -> Tensor:
    return torch.lgamma(x) + torch.lgamma(y) - torch.lgamma(x + y)
