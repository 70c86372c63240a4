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

Gradients are written out, see `Perceptron`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedfusion_flwr.fusion.perceptron import Floats, Perceptron, shared, shared_gradient
from fedfusion_flwr.fusion.sticks import (
    TINY,
    inside,
    kept,
    kumaraswamy_beta_kl,
    kumaraswamy_mean,
    sample_kumaraswamy,
    stick_breaking,
    stick_breaking_gradient,
)

_LOG_STD = (-6.0, 3.0)
_LOG_STICK = (-4.0, 6.0)


def sample_gumbel(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Standard Gumbel noise g = -log(-log u), u ~ Uniform(0, 1)."""
    u = torch.rand(shape, generator=generator).clamp(TINY, 1 - TINY)
    return -(-u.log()).log()


def softmax(logits: Floats) -> Floats:
    """Rows of logits (K, M) -> rows that sum to 1."""
    powers = np.exp(logits - logits.max(1, keepdims=True))
    shares: Floats = powers / powers.sum(1, keepdims=True)
    return shares


class CategoricalKl(NamedTuple):
    """Divergences (K,), and each one's derivatives by its own logits and by log pi, (K, M)."""

    value: Floats
    by_logits: Floats
    by_log_pi: Floats


def categorical_kl(logits: Floats, log_pi: Floats) -> CategoricalKl:
    """KL(Categorical(softmax logits_k) || Categorical(pi)) per row of logits (K, M).

    From logits, because log q is infinite where a probability q underflows.
    """
    below = logits - logits.max(1, keepdims=True)
    powers = np.exp(below)
    sums = powers.sum(1, keepdims=True)
    q = powers / sums
    excess = below - np.log(sums) - log_pi
    value = (q * excess).sum(1, keepdims=True)
    return CategoricalKl(value[:, 0], q * (excess - value), -q)


@dataclass(frozen=True)
class ElboTerms:
    """The terms of one evidence lower bound, each in nats per client."""

    reconstruction: float
    assignment_kl: float
    latent_kl: float
    stick_kl: float

    def total(self, latent_kl_weight: float) -> float:
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
    latent_kl_weight : float
        Weight of the components' KL term in the gradient.
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
        latent_kl_weight: float,
    ) -> None:
        super().__init__()
        self.alpha = alpha
        self.noise_variance = noise_variance
        self.latent_kl_weight = latent_kl_weight
        self.encoder = Perceptron(num_features, *hidden, num_components)
        self.decoder = Perceptron(latent, *reversed(hidden), num_features)
        self.component_mean = nn.Parameter(torch.randn(num_components, latent))
        self.component_log_std = nn.Parameter(torch.full((num_components, latent), -2.0))
        self.log_a = nn.Parameter(torch.zeros(num_components - 1))
        self.log_c = nn.Parameter(torch.zeros(num_components - 1))

    def sticks(self) -> tuple[Floats, Floats]:
        """The Kumaraswamy parameters a and c, each (M-1,), kept in [e^-4, e^6]."""
        return _stick(self.log_a), _stick(self.log_c)

    def mixture(self) -> Tensor:
        """Posterior mean of pi, shape (M,); the sticks are independent, so their means multiply."""
        return torch.as_tensor(stick_breaking(inside(kumaraswamy_mean(*self.sticks()))))

    def assignments(self, x: Tensor) -> Tensor:
        """q(b | x), shape (K, M), without noise."""
        return F.softmax(self.encoder(x), dim=-1)

    def component_features(self) -> Tensor:
        """Every component's own decoded statistics, shape (M, D), standardized units."""
        decoded: Tensor = self.decoder(self.component_mean)
        return decoded

    def partition_gradient(self, x: Tensor, labels: Tensor, centers: Tensor) -> None:
        """Set the gradient of a hard partition's loss, of the parameters it depends on.

        The loss is the encoder's cross entropy, mean over clients, plus the mean squared distance
        of the first components' decoded statistics from the groups' centres.

        Parameters
        ----------
        x : Tensor
            Standardized statistics (K, D).
        labels : Tensor
            Group of every client, (K,), int64, below G.
        centers : Tensor
            Mean of every group's statistics, (G, D), G at most M.
        """
        encoded = self.encoder.trace(x.numpy())
        by_logits = softmax(encoded[-1])
        by_logits[np.arange(len(x)), labels.numpy()] -= 1
        self.encoder.backward(encoded, by_logits / len(x))

        groups = slice(len(centers))
        decoded = self.decoder.trace(shared(self.component_mean)[groups])
        by_decoded = (decoded[-1] - centers.numpy()) * (2 / centers.numel())
        by_sums = self.decoder.backward(decoded, by_decoded)
        by_mean = shared_gradient(self.component_mean)
        by_mean[:] = 0
        by_mean[groups] = self.decoder.by_input(by_sums)

    def elbo(
        self,
        x: Tensor,
        weights: Tensor,
        temperature: float,
        generator: torch.Generator,
        clients: int | None = None,
    ) -> ElboTerms:
        """One-sample estimate of the evidence lower bound; sets the gradient of its negative.

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
            How many clients these stand for, who share the divergences of components and sticks;
            K unless given.
        """
        statistics = x.numpy()
        weight = weights.numpy()[:, None] / len(x)
        share = 1 / (clients or len(x))
        mean, log_std = shared(self.component_mean), shared(self.component_log_std)
        kept_log_std = kept(log_std, *_LOG_STD)
        std = np.exp(kept_log_std)

        encoded = self.encoder.trace(statistics)
        logits = encoded[-1]
        b = softmax((logits + sample_gumbel(logits.shape, generator).numpy()) / temperature)
        noise = std * torch.randn(std.shape, generator=generator).numpy()
        z = mean + noise
        decoded = self.decoder.trace(b @ z)
        error = decoded[-1] - statistics

        # Reconstruction.
        by_sums = self.decoder.backward(decoded, error * (weight / self.noise_variance))
        by_latent = self.decoder.by_input(by_sums)
        by_z = b.T @ by_latent
        by_b = b * (by_latent @ z.T)
        by_logits = (by_b - b * by_b.sum(1, keepdims=True)) / temperature

        # Assignments.
        a, c = self.sticks()
        v = sample_kumaraswamy(a, c, generator)
        pi = stick_breaking(v.value)
        assignment_kl = categorical_kl(logits, np.log(np.maximum(pi, TINY)).astype(logits.dtype))
        self.encoder.backward(encoded, by_logits + weight * assignment_kl.by_logits)

        # Components.
        kl_weight = share * self.latent_kl_weight
        variance = std * std
        by_log_std = (by_z * noise + kl_weight * (variance - 1)) * (kept_log_std == log_std)
        shared_gradient(self.component_mean)[:] = by_z + kl_weight * mean
        shared_gradient(self.component_log_std)[:] = by_log_std

        # Sticks.
        by_log_pi = (weight * assignment_kl.by_log_pi).sum(0) * (pi >= TINY)
        by_v = stick_breaking_gradient(v.value, by_log_pi)
        kl = kumaraswamy_beta_kl(a, c, self.alpha)
        _set_gradient(self.log_a, (by_v * v.by_a + share * kl.by_a) * a)
        _set_gradient(self.log_c, (by_v * v.by_c + share * kl.by_c) * c)

        latent_kl = (mean * mean + variance - 1 - 2 * kept_log_std).sum() / 2
        return ElboTerms(
            reconstruction=-float((weight * error * error).sum()) / (2 * self.noise_variance),
            assignment_kl=float(weight[:, 0] @ assignment_kl.value),
            latent_kl=share * float(latent_kl),
            stick_kl=share * float(kl.value.sum()),
        )


def _stick(log_stick: nn.Parameter) -> Floats:
    return np.exp(kept(shared(log_stick), *_LOG_STICK).astype(np.float64))


def _set_gradient(log_stick: nn.Parameter, by_log_stick: Floats) -> None:
    """Beyond its bounds a parameter changes nothing."""
    values = shared(log_stick)
    shared_gradient(log_stick)[:] = by_log_stick * (kept(values, *_LOG_STICK) == values)
