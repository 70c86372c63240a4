# SPDX-License-Identifier: Apache-2.0
"""FedFusion (Duan et al., CVPR 2023): fuse client models by inferred virtual components.

Round t:
  1. every client reports its normalization parameters d_k
  2. the memory centres them on the cohort and keeps the newest of every client ever seen
  3. a VAE infers assignments b (K, M) and the mixture pi (M,)
  4. p_k = sum_m pi_m n_k b_km / B_m over this round's clients;  w <- sum_k p_k w_k
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from logging import INFO, WARNING
from typing import Any, Literal

import torch
from flwr.common.logger import log
from torch import Tensor

from fedfusion_flwr.federation.replies import ClientReply
from fedfusion_flwr.federation.round import FusionSnapshot, State
from fedfusion_flwr.federation.sampling import stratified_cohort
from fedfusion_flwr.fusion import (
    DistributionInference,
    FusionPosterior,
    InferenceError,
    NormalizationStatistics,
    StatisticsError,
    StatisticsMemory,
    balanced_mixture,
    client_weights,
    component_coefficients,
    example_weights,
    inhabited,
    prune_assignments,
)
from fedfusion_flwr.fusion.absent import AbsentComponents
from fedfusion_flwr.fusion.statistics import batchnorm_prefixes
from fedfusion_flwr.randomness import numpy_generator
from fedfusion_flwr.strategies.single import SingleModelStrategy

Mixture = Literal["inferred", "balanced", "counts"]


class FedFusion(SingleModelStrategy):
    """Component-weighted aggregation with server-side inference; drop-in for Flower's FedAvg.

    Clients need no change: the statistics are read from the state dict they return, unless they
    send a ``normalization`` record of their own.

    Parameters
    ----------
    num_components : int
        M, the most virtual components that are looked for.
    mixture : {"inferred", "balanced", "counts"}
        What pi is: the posterior mean; proportional to (population share)^balance_exponent; or the
        shares of this round's examples, which is FedAvg and exists as a control.
    balance_exponent : float
        rho in [0, 1] of the balanced mixture.
    sampling : {"random", "stratified"}
        ``stratified`` draws cohorts in which components appear in proportion to pi.
    absent : {"drop", "remember"}
        A component without clients in a round: renormalize pi over the others, or let it contribute
        its last pseudo-gradient (cf. FedVARP, Jhunjhunwala et al. 2022).
    assignment_smoothing : float
        In [0, 1): share of a client's earlier assignment that is kept at each inference.
    vae_step : int
        Infer every so many rounds (and whenever a new client appears).
    inference : DistributionInference or None
        Replaces the default inference; its number of components must be ``num_components``.
    **base
        Arguments of `SingleModelStrategy` and of Flower's FedAvg.
    """

    STATE = (
        *SingleModelStrategy.STATE,
        "inference",
        "memory",
        "absent",
        "posterior",
        "width",
        "mixture",
        "component_models",
    )

    def __init__(
        self,
        *,
        num_components: int = 8,
        mixture: Mixture = "balanced",
        balance_exponent: float = 0.5,
        sampling: Literal["random", "stratified"] = "random",
        absent: Literal["drop", "remember"] = "drop",
        assignment_smoothing: float = 0.5,
        vae_step: int = 1,
        inference: DistributionInference | None = None,
        **base: Any,
    ) -> None:
        super().__init__(**base)
        self.num_components = num_components
        self.mixture_kind = mixture
        self.balance_exponent = balance_exponent
        self.sampling = sampling
        self.vae_step = vae_step
        self.inference = inference or DistributionInference(num_components, self.seed)
        if self.inference.num_components != num_components:
            raise ValueError(
                f"num_components = {num_components}, but the given inference has "
                f"{self.inference.num_components}"
            )
        self.memory = StatisticsMemory(assignment_smoothing)
        self.absent = AbsentComponents(self.pool_moments) if absent == "remember" else None
        self.posterior: FusionPosterior | None = None
        self.width: int | None = None
        self._remembered_share = 0.0
        self.component_models: dict[int, State] = {}
        self.mixture = torch.full((num_components,), 1 / num_components, dtype=torch.float64)

    def summary(self) -> None:
        """Log the strategy's settings at the start of a run."""
        log(
            INFO,
            "\t├──> Fusion: %d components, mixture %s, sampling %s",
            self.num_components,
            self._mixture_name(),
            self.sampling,
        )
        super().summary()

    def sample_clients(self, server_round: int, clients: list[int], size: int) -> list[int]:
        """Random, or with the inferred components in proportion to the mixture."""
        if self.sampling == "random" or self.posterior is None:
            return super().sample_clients(server_round, clients, size)
        known = [i for i in self.memory.ids if self.memory.clients[i].assignment is not None]
        main = self.memory.assignments(known).argmax(1).tolist()
        generator = numpy_generator(self.seed, "stratified-sampling", server_round)
        return stratified_cohort(
            clients, size, dict(zip(known, main, strict=True)), self.mixture.tolist(), generator
        )

    def client_weights(self, replies: list[ClientReply]) -> Tensor:
        """Infer, choose the mixture and weight this round's clients; (K,), float64."""
        ids = [reply.client for reply in replies]
        examples = torch.tensor([reply.num_examples for reply in replies], dtype=torch.float64)
        try:
            self._infer(replies)
        except InferenceError as problem:
            log(
                WARNING,
                "round %d: inference failed (%s); example weights are used",
                self.server_round,
                problem,
            )
            self.report.metrics["fusion-fallback"] = 1.0
            return example_weights(examples)
        self.report.metrics["fusion-fallback"] = 0.0
        assignments = self._assignments(ids)
        self.mixture = self._choose_mixture(assignments, examples)
        if self.mixture_kind == "counts":
            return client_weights(assignments, self.mixture, examples)
        # Traces of a component are no sample of it: what nobody here lives in is absent.
        present = self.mixture * inhabited(assignments)
        return client_weights(assignments, present, examples)

    def aggregate(self, replies: list[ClientReply], weights: Tensor) -> State:
        """Fuse this round's models, with the remembered steps of absent components if asked."""
        fell_back = bool(self.report.metrics["fusion-fallback"])
        if self.absent is None or fell_back:
            return super().aggregate(replies, weights)
        assignments = self._assignments([reply.client for reply in replies])
        states = [reply.state for reply in replies]
        ghosts, ghost_weights = self.absent.recall(assignments, self.mixture, self.current)
        self.report.metrics["components-remembered"] = float(len(ghosts))
        share = torch.tensor(ghost_weights, dtype=torch.float64)
        self._remembered_share = float(share.sum())
        all_weights = torch.cat([weights * (1 - share.sum()), share])

        def chained() -> Iterator[State]:
            yield from states
            yield from ghosts

        return self.fuse_states(chained(), all_weights)

    def accepted(self, replies: list[ClientReply], weights: Tensor) -> None:
        """Record the inference with the final weights and what absent components last did."""
        if self.report.metrics["fusion-fallback"]:
            return
        ids = [reply.client for reply in replies]
        self._record(ids, weights * (1 - self._remembered_share))
        if self.evaluates(self.server_round):
            self._fuse_components(replies)
        if self.absent is not None:
            examples = torch.tensor([reply.num_examples for reply in replies])
            states = [reply.state for reply in replies]
            self.absent.remember(states, self._assignments(ids), examples, self.current)

    def personal_model(self, client: int) -> State:
        """sum_m b_km w_m: the client's mixture of component models.

        The served global model for clients unknown to the inference, and for those none of whose
        components has had a model yet.
        """
        known = self.memory.clients.get(client)
        if known is None or known.assignment is None:
            return self.served
        shares = self._assignments([client])[0].tolist()
        parts = {m: share for m, share in enumerate(shares) if share and m in self.component_models}
        if len(parts) <= 1:
            return next((self.component_models[m] for m in parts), self.served)
        weights = torch.tensor(list(parts.values()), dtype=torch.float64)
        return self.fuse_states((self.component_models[m] for m in parts), weights / weights.sum())

    def models(self) -> dict[str, State]:
        """The component models of the last round in which clients evaluated, ``m0``, ``m1``, ..."""
        return {f"m{m}": state for m, state in sorted(self.component_models.items())}

    def num_channels(self) -> int | None:
        """Also known for other normalization layers, once a first round has told it."""
        return super().num_channels() or (self.width // 4 if self.width else None)

    def assignment_of(self, reply: ClientReply) -> list[float] | None:
        """The client's smoothed assignment."""
        known = self.memory.clients.get(reply.client)
        if known is None or known.assignment is None:
            return None
        return [round(value, 6) for value in known.assignment.tolist()]

    def _infer(self, replies: list[ClientReply]) -> None:
        received, told = None, replies
        if batchnorm_prefixes(self.current):
            received = self._read(self.current).vector(log_std=True)
        else:
            # One who says nothing must not end the run; from the next round on it is dropped.
            told = [reply for reply in replies if reply.statistics is not None] or replies
        vectors = {reply.client: self._statistics(reply).vector(log_std=True) for reply in told}
        widths = Counter(len(vector) for vector in vectors.values())
        if self.width is None:
            self.width = widths.most_common(1)[0][0]
        if len(told) < len(replies):
            raise InferenceError("some clients sent no normalization record")
        if set(widths) != {self.width}:
            raise InferenceError(f"clients' statistics differ in length: {sorted(widths)}")
        self.memory.remember(
            self.server_round, vectors, {r.client: r.num_examples for r in replies}, received
        )
        newcomers = any(c.assignment is None for c in self.memory.clients.values())
        if newcomers or self.posterior is None or (self.server_round - 1) % self.vae_step == 0:
            posterior = self.inference.fit(self.memory.vectors(), self.memory.num_examples())
            self.posterior = self.memory.absorb(posterior)
            self.report.metrics["elbo"] = self.posterior.elbo

    def _fuse_components(self, replies: list[ClientReply]) -> None:
        """w_m = sum_k (n_k b_km / B_m) w_k; a component absent from the round keeps its last."""
        assignments = self._assignments([reply.client for reply in replies])
        examples = torch.tensor([reply.num_examples for reply in replies])
        coefficients = component_coefficients(assignments, examples)
        for component in torch.nonzero(inhabited(assignments)).flatten().tolist():
            self.component_models[component] = self.fuse_states(
                (reply.state for reply in replies), coefficients[component]
            )

    def _statistics(self, reply: ClientReply) -> NormalizationStatistics:
        return reply.statistics or self._read(reply.state)

    def _read(self, state: State) -> NormalizationStatistics:
        try:
            return NormalizationStatistics.from_state_dict(state, layers=self.statistics_layers)
        except StatisticsError as problem:
            raise StatisticsError(f"FedFusion cannot run on this model: {problem}") from problem

    def _assignments(self, ids: list[int]) -> Tensor:
        """Rows of the given clients, without components that nobody of the population lives in."""
        known = self.memory.ids
        pruned = prune_assignments(self.memory.assignments(known))
        return pruned[_places(ids, known)]

    def _choose_mixture(self, assignments: Tensor, examples: Tensor) -> Tensor:
        if self.mixture_kind == "inferred":
            assert self.posterior is not None
            return self.posterior.mixture
        if self.mixture_kind == "counts":
            mass = examples @ assignments
            return mass / mass.sum()
        known = self.memory.ids
        population = self.memory.num_examples() @ self._assignments(known)
        return balanced_mixture(population, self.balance_exponent)

    def _record(self, ids: list[int], weights: Tensor) -> None:
        assert self.posterior is not None
        known = self.memory.ids
        everyone = torch.zeros(len(known), dtype=torch.float64)
        everyone[_places(ids, known)] = weights
        self.report.fusion = FusionSnapshot(
            known, self.posterior, self.mixture, everyone, self.memory.vectors()
        )
        main = self.posterior.assignments.argmax(1).tolist()
        self.report.clusters = dict(zip(known, main, strict=True))
        self.report.metrics["components-occupied"] = float(len(set(main)))

    def _mixture_name(self) -> str:
        if self.mixture_kind == "balanced":
            return f"balanced (exponent {self.balance_exponent:g})"
        return self.mixture_kind


def _places(ids: list[int], known: list[int]) -> list[int]:
    place = {client: row for row, client in enumerate(known)}
    return [place[client] for client in ids]
