# SPDX-License-Identifier: Apache-2.0
"""The variational auto-encoder over clients' normalization parameters.

Generative story for K clients and M virtual components; x_k is what client k's statistics say in
the few directions that tell clients apart, the mean over the rounds in which it took part:

    b_k ~ Dirichlet(a, ..., a)               membership of client k, on the simplex
    x_k ~ Normal(sum_m b_km z_m, (s^2 + v_k) I)

z_m is the decoded component m. v_k is measured: the spread of the client's statistics over rounds,
divided by their number. a and s are learned: a small concentration a makes clients pure, a large
one mixed, and s^2 is the variance between clients of one mixture, whose data are different samples.

The encoder gives a logistic-normal posterior of b_k (Atchison & Shen 1980), which unlike the
Gumbel-softmax of the first version is no relaxation of a hard choice: clients can be mixtures.
"""

from __future__ import annotations

import math

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

_LOG_STD = (-4.0, 1.5)
_LOG_CONCENTRATION = (math.log(0.02), math.log(10.0))
_LOG_NOISE = (math.log(0.03), math.log(2.0))
_SMALLEST_SHARE = 0.02
_START_LOG_STD = -1.0
_PURE = 0.9


def dirichlet_log_density(log_b: Tensor, concentration: Tensor) -> Tensor:
    """Log density of a symmetric Dirichlet, in additive log-ratio coordinates.

    log Gamma(M a) - M log Gamma(a) + a sum_m log b_m. The Jacobian of the coordinates,
    prod_m b_m, turns the usual exponent a - 1 into a.

    Parameters
    ----------
    log_b : Tensor
        Logarithms of memberships, shape (..., M).
    concentration : Tensor
        a, a positive scalar.

    Returns
    -------
    Tensor
        Shape (...).
    """
    count, a = log_b.shape[-1], concentration
    constant = torch.lgamma(count * a) - count * torch.lgamma(a)
    return constant + a * log_b.sum(-1)


def logistic_normal_entropy(log_std: Tensor) -> Tensor:
    """Entropy of softmax(Normal(mean, diag(std^2))), in the same coordinates as the Dirichlet's.

    With log-ratios h_m - h_M the covariance is D + s_M^2 11', D = diag(s_1^2, ..., s_{M-1}^2),
    whose determinant is prod_m s_m^2 * sum_m 1 / s_m^2 over all M.

    Parameters
    ----------
    log_std : Tensor
        Shape (..., M).

    Returns
    -------
    Tensor
        Nats, shape (...).
    """
    count = log_std.shape[-1]
    log_determinant = 2 * log_std.sum(-1) + torch.logsumexp(-2 * log_std, -1)
    return ((count - 1) * math.log(2 * math.pi * math.e) + log_determinant) / 2


class FusionVAE(nn.Module):
    """Encoder to memberships, and components that mix linearly.

    Parameters
    ----------
    num_features : int
        P, the number of directions.
    num_components : int
        M, at least 2.
    hidden : int
        Width of the encoder's hidden layer.
    """

    def __init__(self, num_features: int, num_components: int, hidden: int) -> None:
        super().__init__()
        self.num_features, self.num_components = num_features, num_components
        # One more input than directions: how sure x is.
        self.encoder = nn.Sequential(
            nn.Linear(num_features + 1, hidden), nn.Tanh(), nn.Linear(hidden, 2 * num_components)
        )
        self.components = nn.Parameter(torch.zeros(num_components, num_features))
        self.log_concentration = nn.Parameter(torch.tensor(math.log(0.5)))
        self.log_noise = nn.Parameter(torch.tensor(math.log(0.3)))

    def encode(self, x: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log standard deviation of the logits of b, each (K, M).

        ``x`` is (K, P), and ``variance`` (K,) holds v.
        """
        inputs = torch.cat([x, variance.sqrt().unsqueeze(1)], 1)
        mean, log_std = self.encoder(inputs).chunk(2, -1)
        return mean - mean.mean(1, keepdim=True), log_std.clamp(*_LOG_STD)

    def memberships(self, x: Tensor, variance: Tensor, noise: Tensor) -> Tensor:
        """Posterior mean of b, (K, M), over S draws of standard normal ``noise`` (S, 1, M)."""
        mean, log_std = self.encode(x, variance)
        return F.softmax(mean + log_std.exp() * noise, -1).mean(0)

    def start_at(self, x: Tensor, memberships: Tensor) -> Tensor:
        """Put the components where these memberships (K, M) want them; the logits to encode."""
        solution = torch.linalg.lstsq(memberships, x, driver="gelsd").solution
        residual = (x - memberships @ solution).square().mean().sqrt()
        with torch.no_grad():
            self.components.copy_(solution)
            self.log_noise.copy_(residual.log().clamp(*_LOG_NOISE))
            pure = bool(memberships.max(1).values.mean() > _PURE)
            self.log_concentration.fill_(math.log(0.1 if pure else 0.5))
        logits = memberships.clamp_min(_SMALLEST_SHARE).log()
        return logits - logits.mean(1, keepdim=True)

    def distance(self, x: Tensor, variance: Tensor, logits: Tensor) -> Tensor:
        """Mean squared difference of the encoder from logits (K, M) known with little spread."""
        mean, log_std = self.encode(x, variance)
        return F.mse_loss(mean, logits) + (log_std - _START_LOG_STD).square().mean()

    def elbo(self, x: Tensor, variance: Tensor, samples: int, generator: Generator) -> Tensor:
        """Estimate of the evidence lower bound of every client, shape (K,), in nats.

        Parameters
        ----------
        x, variance : Tensor
            What the clients' statistics say, (K, P), and how sure that is, v (K,).
        samples : int
            Number of draws of b for each client.
        generator : torch.Generator
            Source of the draws.
        """
        mean, log_std = self.encode(x, variance)
        noise = torch.randn((samples, *mean.shape), generator=generator)
        log_b = F.log_softmax(mean + log_std.exp() * noise, -1)
        spread = (2 * self.log_noise.clamp(*_LOG_NOISE)).exp() + variance
        error = (x - log_b.exp() @ self.components).square().sum(-1)
        likelihood = -(error / spread + x.shape[1] * (2 * math.pi * spread).log()) / 2
        concentration = self.log_concentration.clamp(*_LOG_CONCENTRATION).exp()
        expected = likelihood + dirichlet_log_density(log_b, concentration)
        return expected.mean(0) + logistic_normal_entropy(log_std)
