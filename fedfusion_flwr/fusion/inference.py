# SPDX-License-Identifier: Apache-2.0
"""Inference of the clients' mixtures: what tells them apart, the VAE, and its posterior."""

from __future__ import annotations

import math
from dataclasses import KW_ONLY, dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Generator, Tensor, nn
from torch.optim import Adam

from fedfusion_flwr.fusion.folding import ROWS, Folding
from fedfusion_flwr.fusion.initialization import agreement, archetypes, clear_groups
from fedfusion_flwr.fusion.noise import FEWEST_RESIDUALS, Signals, signals
from fedfusion_flwr.fusion.standardizer import COLUMNS, Standardizer
from fedfusion_flwr.fusion.threads import one_thread, pieces, side_by_side
from fedfusion_flwr.fusion.vae import FusionVAE

_GRADIENT_NORM = 10.0
_START_STEPS = 100
_DRAWS = 64
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
    clear_groups : bool
        Whether clients form clear groups (mean silhouette 0.5 or more) and are no mixtures.
    """

    assignments: Tensor
    mixture: Tensor
    components: Tensor
    elbo: float
    clear_groups: bool = False


class _Observed(NamedTuple):
    """Clients as the VAE sees them, in float32: x (K, P) and its noise variance v (K,)."""

    x: Tensor
    variance: Tensor


@dataclass(eq=False)
class DistributionInference:
    """Infers which virtual components the clients' data are mixtures of.

    Statistics are whitened by their measured noise and reduced to the directions that tell clients
    apart; their number P, and whether clients form clear groups, give the number of components. A
    fit from scratch starts the VAE from groups or archetypes. Later fits go on from the last one,
    also with other clients, unless those numbers have changed.

    Parameters
    ----------
    num_components : int
        M, at least 1. More than the data needs is harmless: spare components stay empty.
    seed : int
        Non-negative; equal seeds and inputs give equal posteriors.
    hidden : int
        Width of the encoder.
    steps, refit_steps : int
        Adam steps of a fit from scratch and of a warm start.
    learning_rate : float
        Adam's.
    samples : int
        Draws of every client's membership in one step.
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
    hidden: int = 32
    steps: int = 200
    refit_steps: int = 10
    learning_rate: float = 2e-2
    samples: int = 8
    max_features: int = 256
    batch_size: int = 512

    def __post_init__(self) -> None:
        if self.num_components < 1:
            raise ValueError(f"num_components must be at least 1, got {self.num_components}")
        if self.seed < 0:
            raise ValueError(f"seed must not be negative, got {self.seed}")
        self.num_fits = 0
        self._vae: FusionVAE | None = None
        self._optimizer: Adam | None = None
        self._directions: Tensor | None = None

    def capture(self) -> dict[str, object]:
        """All that later fits depend on, for `restore`."""
        return {
            "fits": self.num_fits,
            "network": None if self._vae is None else dict(self._vae.state_dict()),
            "optimizer": None if self._optimizer is None else self._optimizer.state_dict(),
            "directions": self._directions,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Continue where the captured inference stopped."""
        self.num_fits = state["fits"]
        self._vae, self._optimizer, self._directions = None, None, state["directions"]
        if state["network"] is not None:
            count, width = state["network"]["components"].shape
            self._vae, self._optimizer = self._new_vae(width, count)
            self._vae.load_state_dict(state["network"])
            self._optimizer.load_state_dict(state["optimizer"])

    @one_thread()
    def fit(
        self,
        vectors: Tensor,
        num_examples: Tensor,
        *,
        rounds: Tensor | None = None,
        residuals: Tensor | None = None,
    ) -> FusionPosterior:
        """Infer assignments, mixture and components.

        Parameters
        ----------
        vectors : Tensor
            Statistics, shape (K, D), finite; of a client seen in several rounds, their mean.
        num_examples : Tensor
            Training examples per client, shape (K,), positive.
        rounds : Tensor or None
            How many rounds each row of ``vectors`` is the mean of, shape (K,); 1 by default.
        residuals : Tensor or None
            Draws of the noise in one round's statistics, shape (R, D), as `StatisticsMemory`
            collects them. Without them, or with fewer than eight, the noise is unknown and every
            feature counts the same.

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
        if self.num_components == 1 or len(x) < 3 or not scaler.informative.any():
            return self._posterior(x, n, torch.ones(len(x), 1).double(), 0.0)
        folding = Folding(x.shape[1], self.max_features, self._seeds(_ALL_FITS)[1])
        features, noise = folding.features(scaler, x), None
        if residuals is not None and len(residuals) >= FEWEST_RESIDUALS:
            noise = folding.features(scaler.without_center(), residuals)
        seen = torch.ones(len(x)) if rounds is None else torch.as_tensor(rounds)
        most = min(self.num_components, len(x)) - 1
        found = signals(features, seen.double(), noise, most)
        if not found.directions.shape[1]:
            return self._posterior(x, n, torch.ones(len(x), 1).double(), 0.0)
        assignments, elbo, clear = self._fit_vae(found)
        return replace(self._posterior(x, n, assignments, elbo), clear_groups=clear)

    def _posterior(self, x: Tensor, n: Tensor, assignments: Tensor, elbo: float) -> FusionPosterior:
        """With spare components, and the components in the units of the input."""
        if not assignments.isfinite().all():
            self._vae = None
            raise InferenceError("the posterior is not finite")
        b = assignments / assignments.sum(1, keepdim=True)
        # The components that explain the clients best: of pure clients, the groups' means.
        center = x.mean(0, dtype=torch.float64)
        inverse = torch.linalg.pinv(b, rtol=1e-6)
        components = center.repeat(self.num_components, 1)
        for columns in pieces(x.shape[1], COLUMNS):
            part = x[:, columns].double() - center[columns]
            components[: b.shape[1], columns] += inverse @ part
        b = nn.functional.pad(b, (0, self.num_components - b.shape[1]))
        return FusionPosterior(b, n @ b / n.sum(), components, elbo)

    def _fit_vae(self, found: Signals) -> tuple[Tensor, float, bool]:
        generator = Generator().manual_seed(self._seeds(self.num_fits)[0])
        vae, optimizer, steps = self._vae, self._optimizer, self.refit_steps
        before = 0 if vae is None else vae.num_components
        labels = clear_groups(found.x, self.num_components, before)
        count = found.x.shape[1] + 1 if labels is None else int(labels.max()) + 1
        found = found.leading(count - 1)
        earlier = self._directions
        if earlier is not None and earlier.shape == found.directions.shape:
            found = found.turned_towards(earlier)
        seen = _Observed(found.x.float(), found.variance.float())
        if vae is None or optimizer is None or not _still_fits(vae, seen, count, labels):
            vae, optimizer = self._new_vae(seen.x.shape[1], count)
            start = archetypes(found.x, count) if labels is None else nn.functional.one_hot(labels)
            self._start(vae, optimizer, seen, start.float(), generator)
            steps = self.steps
        # Forgotten until the fit succeeds, so that a diverged network is never a warm start.
        self._vae = None
        elbo = self._ascend(vae, optimizer, seen, steps, generator)
        self._vae, self._optimizer, self._directions = vae, optimizer, found.directions
        with torch.no_grad():
            noise = torch.randn((_DRAWS, 1, vae.num_components), generator=generator)
            b = vae.memberships(seen.x, seen.variance, noise).double()
        return b, elbo, labels is not None

    def _new_vae(self, num_features: int, num_components: int) -> tuple[FusionVAE, Adam]:
        with torch.random.fork_rng(devices=[]):
            # Not torch.manual_seed, which would reseed the accelerators too.
            torch.default_generator.manual_seed(self._seeds(_ALL_FITS)[0])
            vae = FusionVAE(num_features, num_components, self.hidden)
        return vae, Adam(vae.parameters(), lr=self.learning_rate, fused=True)

    def _start(
        self,
        vae: FusionVAE,
        optimizer: Adam,
        found: _Observed,
        memberships: Tensor,
        generator: Generator,
    ) -> None:
        """Fit components and encoder to these memberships (K, G)."""
        logits = vae.start_at(found.x, memberships)
        for _ in range(_START_STEPS):
            rows = self._batch(len(logits), generator)
            _step(vae, optimizer, vae.distance(found.x[rows], found.variance[rows], logits[rows]))

    def _ascend(
        self,
        vae: FusionVAE,
        optimizer: Adam,
        found: _Observed,
        steps: int,
        generator: Generator,
    ) -> float:
        """Maximize the ELBO, and return that of the last step."""
        elbo = 0.0
        for step in range(steps):
            rows = self._batch(len(found.x), generator)
            loss = -vae.elbo(found.x[rows], found.variance[rows], self.samples, generator).mean()
            elbo = -loss.item()
            if not math.isfinite(elbo):
                raise InferenceError(f"the loss is not finite at step {step + 1} of {steps}")
            _step(vae, optimizer, loss)
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


def _still_fits(vae: FusionVAE, seen: _Observed, count: int, labels: Tensor | None) -> bool:
    """Whether the last network can go on: as many components, and the same clear groups."""
    if (seen.x.shape[1], count) != (vae.num_features, vae.num_components):
        return False
    if labels is None:
        return True
    with torch.no_grad():
        mean, _ = vae.encode(seen.x, seen.variance)
    return agreement(labels, mean.argmax(1)) >= _WARM_AGREEMENT


def _step(vae: FusionVAE, optimizer: Adam, loss: Tensor) -> None:
    optimizer.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    nn.utils.clip_grad_norm_(vae.parameters(), _GRADIENT_NORM)
    optimizer.step()
