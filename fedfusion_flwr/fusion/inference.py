# SPDX-License-Identifier: Apache-2.0
"""Inference of the clients' mixtures: standardize, fit the VAE, read the posterior."""

from __future__ import annotations

import math
from dataclasses import KW_ONLY, dataclass
from typing import Any

import numpy as np
import torch
from torch import Generator, Tensor, nn
from torch.optim import Adam

from fedfusion_flwr.fusion.folding import ROWS, Folding
from fedfusion_flwr.fusion.initialization import agreement, starting_partition
from fedfusion_flwr.fusion.standardizer import Standardizer
from fedfusion_flwr.fusion.threads import one_thread, side_by_side
from fedfusion_flwr.fusion.vae import FusionVAE

_GRADIENT_NORM = 10.0
_PARTITION_STEPS = 50
_WARM_AGREEMENT = 0.9
_ALL_FITS = 0


class InferenceError(RuntimeError):
    """The loss or the posterior is not finite; the caller falls back to example weights."""


@dataclass(frozen=True)
class FusionPosterior:
    """What the server infers about the clients' data.

    Attributes
    ----------
    assignments : Tensor
        b, shape (K, M), float64, rows sum to 1.
    mixture : Tensor
        Posterior mean of pi, shape (M,), float64, sums to 1.
    components : Tensor
        Decoded statistics of every virtual component, shape (M, D), in the units of the input.
    elbo : float
        Evidence lower bound of the last step, nats per client; 0 if there was nothing to infer.
    """

    assignments: Tensor
    mixture: Tensor
    components: Tensor
    elbo: float


@dataclass(eq=False)
class DistributionInference:
    """Infers which virtual components the clients' data are mixtures of.

    A fit from scratch starts from a hard partition of the clients (k-means, with the number of
    groups chosen by silhouette): encoder and decoder are first fitted to it, then the ELBO takes
    over. Later fits start from the last one, also with other clients, unless a fresh partition
    contradicts it.

    Parameters
    ----------
    num_components : int
        M, at least 1. More than the data needs is harmless: spare components stay empty.
    seed : int
        Non-negative; equal seeds and inputs give equal posteriors.
    hidden : tuple[int, ...]
        Encoder widths; the decoder mirrors them. The published setting is (1024, 512).
    latent : int
        Width of a component's latent. The published setting is 128.
    steps, refit_steps : int
        Adam steps of a fit from scratch and of a warm start (published: 30).
    learning_rate, weight_decay : float
        Adam's; the sticks, a handful of scalars, use ten times the learning rate.
    stick_concentration : float
        alpha of the Beta(1, alpha) stick prior.
    latent_kl_weight : float
        Weight of the components' KL term; well below 1, true groups are split over components.
    noise_variance : float
        Observation variance of a standardized feature.
    temperature : tuple[float, float]
        Gumbel-softmax temperature at the first and at the last step of a fit.
    max_features : int
        Wider inputs are folded to this width, see `Folding`.
    batch_size : int
        Most clients in one Adam step; of more, each step draws this many.

    Raises
    ------
    ValueError
        If ``num_components`` or ``seed`` is out of range.
    """

    num_components: int
    seed: int = 0
    _: KW_ONLY
    hidden: tuple[int, ...] = (128, 64)
    latent: int = 16
    steps: int = 60
    refit_steps: int = 5
    learning_rate: float = 3e-3
    weight_decay: float = 1e-4
    stick_concentration: float = 1.0
    latent_kl_weight: float = 1.0
    noise_variance: float = 1.0
    temperature: tuple[float, float] = (1.0, 0.3)
    max_features: int = 1024
    batch_size: int = 512

    def __post_init__(self) -> None:
        if self.num_components < 1:
            raise ValueError(f"num_components must be at least 1, got {self.num_components}")
        if self.seed < 0:
            raise ValueError(f"seed must not be negative, got {self.seed}")
        self.num_fits = 0
        self._vae: FusionVAE | None = None
        self._optimizer: Adam | None = None

    def capture(self) -> dict[str, object]:
        """All that later fits depend on, for `restore`."""
        return {
            "fits": self.num_fits,
            "network": None if self._vae is None else dict(self._vae.state_dict()),
            "optimizer": None if self._optimizer is None else self._optimizer.state_dict(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Continue where the captured inference stopped."""
        self.num_fits = state["fits"]
        self._vae, self._optimizer = None, None
        if state["network"] is not None:
            width = state["network"]["encoder.0.weight"].shape[1]
            self._vae, self._optimizer = self._new_vae(width)
            self._vae.load_state_dict(state["network"])
            self._optimizer.load_state_dict(state["optimizer"])

    @one_thread()
    def fit(self, vectors: Tensor, num_examples: Tensor) -> FusionPosterior:
        """Infer assignments, mixture and components.

        Parameters
        ----------
        vectors : Tensor
            Statistics, shape (K, D), finite.
        num_examples : Tensor
            Training examples per client, shape (K,), positive.

        Raises
        ------
        ValueError
            If shapes do not fit or a value is not finite.
        InferenceError
            If the loss or the posterior is not finite.
        """
        x, n = torch.as_tensor(vectors), torch.as_tensor(num_examples).double()
        if x.dim() != 2 or n.shape != x.shape[:1] or not x.numel():
            raise ValueError(f"expected (K, D) and (K,), got {tuple(x.shape)}, {tuple(n.shape)}")
        # In parts, to need little memory beside the statistics.
        finite = all(side_by_side(lambda part: bool(part.isfinite().all()), torch.split(x, ROWS)))
        if not (finite and n.isfinite().all() and (n > 0).all()):
            raise ValueError("statistics must be finite and examples positive")
        self.num_fits += 1
        scaler = Standardizer.of(x)
        if self.num_components == 1 or not scaler.informative.any():
            return self._one_component(x)
        folding = Folding(x.shape[1], self.max_features, self._seeds(_ALL_FITS)[1])
        features = folding.features(scaler, x)
        vae, elbo = self._fit_vae(features, (n / n.mean()).float())
        with torch.no_grad():
            assignments = vae.assignments(features).double()
            mixture = vae.mixture().double()
            decoded = vae.component_features().double()
            if folding.folds:
                decoded = folding.unfold(decoded, features, assignments, scaler, x)
            components = scaler.restore(decoded)
        if not all(t.isfinite().all() for t in (assignments, mixture, components)):
            self._vae = None
            raise InferenceError("the posterior is not finite")
        rows = assignments.sum(1, keepdim=True)
        return FusionPosterior(assignments / rows, mixture / mixture.sum(), components, elbo)

    def _one_component(self, x: Tensor) -> FusionPosterior:
        """The answer where clients cannot differ: all of them in the first component."""
        assignments = torch.zeros(len(x), self.num_components, dtype=torch.float64)
        assignments[:, 0] = 1
        components = x.mean(0, dtype=torch.float64).expand(self.num_components, -1).clone()
        return FusionPosterior(assignments, assignments[0].clone(), components, 0.0)

    def _fit_vae(self, x: Tensor, weights: Tensor) -> tuple[FusionVAE, float]:
        generator = Generator().manual_seed(self._seeds(self.num_fits)[0])
        labels = starting_partition(x, self.num_components)
        vae, optimizer = self._vae, self._optimizer
        if vae is None or optimizer is None or not self._still_fits(vae, x, labels):
            vae, optimizer = self._new_vae(x.shape[1])
            self._fit_partition(vae, optimizer, x, labels, generator)
            steps = self.steps
        else:
            steps = self.refit_steps
        # Forgotten until the fit succeeds, so that a diverged network is never a warm start.
        self._vae = None
        elbo = self._ascend(vae, optimizer, x, weights, steps, generator)
        self._vae, self._optimizer = vae, optimizer
        return vae, elbo

    def _still_fits(self, vae: FusionVAE, x: Tensor, labels: Tensor) -> bool:
        """Whether the last network agrees with a fresh partition of the clients."""
        if x.shape[1] != vae.num_features:
            return False
        with torch.no_grad():
            current = vae.assignments(x).argmax(1)
        return agreement(labels, current) >= _WARM_AGREEMENT

    def _new_vae(self, num_features: int) -> tuple[FusionVAE, Adam]:
        with torch.random.fork_rng(devices=[]):
            # Not torch.manual_seed, which would reseed the accelerators too.
            torch.default_generator.manual_seed(self._seeds(_ALL_FITS)[0])
            vae = FusionVAE(
                num_features,
                self.num_components,
                hidden=self.hidden,
                latent=self.latent,
                alpha=self.stick_concentration,
                noise_variance=self.noise_variance,
            )
        sticks = [vae.log_a, vae.log_c]
        rest = [p for p in vae.parameters() if all(p is not s for s in sticks)]
        optimizer = Adam(
            [
                {"params": rest, "weight_decay": self.weight_decay},
                {"params": sticks, "lr": 10 * self.learning_rate},
            ],
            lr=self.learning_rate,
            fused=True,
        )
        return vae, optimizer

    def _fit_partition(
        self, vae: FusionVAE, optimizer: Adam, x: Tensor, labels: Tensor, generator: Generator
    ) -> None:
        """Fit the encoder to a hard partition, and the decoder to its centres."""
        groups = int(labels.max()) + 1
        centers = torch.stack([x[labels == m].mean(0) for m in range(groups)])
        for _ in range(_PARTITION_STEPS):
            rows = self._batch(len(x), generator)
            optimizer.zero_grad()
            loss = vae.partition_loss(x[rows], labels[rows], centers)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()

    def _ascend(
        self,
        vae: FusionVAE,
        optimizer: Adam,
        x: Tensor,
        weights: Tensor,
        steps: int,
        generator: Generator,
    ) -> float:
        """Maximize the ELBO, and return that of the last step."""
        hot, cold = self.temperature
        elbo = 0.0
        for step in range(steps):
            temperature = hot * (cold / hot) ** (step / max(steps - 1, 1))
            rows = self._batch(len(x), generator)
            terms = vae.elbo(x[rows], weights[rows], temperature, generator, len(x))
            loss = -terms.total(self.latent_kl_weight)
            elbo = -loss.item()
            if not math.isfinite(elbo):
                raise InferenceError(f"the loss is not finite at step {step + 1} of {steps}")
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(vae.parameters(), _GRADIENT_NORM)
            optimizer.step()
        return elbo

    def _seeds(self, fit: int) -> list[int]:
        """Two seeds for one fit, counted from 1, or for what all fits share.

        From the pair (seed, fit): their sum would give neighbouring seeds the same noise.
        """
        return [int(s) for s in np.random.SeedSequence((self.seed, fit)).generate_state(2)]

    def _batch(self, clients: int, generator: Generator) -> Tensor | slice:
        """The rows of one Adam step."""
        if clients <= self.batch_size:
            return slice(None)
        return torch.randint(clients, (self.batch_size,), generator=generator)
