# SPDX-License-Identifier: Apache-2.0
"""FedFusion (Duan et al., CVPR 2023): fuse client models by inferred virtual components.

Round t:
  1. every client reports its normalization parameters d_k
  2. the memory centres them on the cohort and keeps the newest of every client ever seen
  3. a VAE infers assignments b (K, M) and the mixture pi (M,)
  4. p_k = sum_m pi_m n_k b_km / B_m over this round's clients;  w <- sum_k p_k w_k
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from logging import WARNING

import torch
from flwr.common.logger import log
from torch import Tensor, nn

from fedfusion_flwr.config import Absent, Mixture, RunConfig, Sampling
from fedfusion_flwr.config_rules import DECAY, RATE, at_least, between, checked, choice
from fedfusion_flwr.errors import ArgumentError
from fedfusion_flwr.federation.bookkeeping import Timer
from fedfusion_flwr.federation.replies import ClientReply, weights_by_examples
from fedfusion_flwr.federation.round import Exchange, FusionSnapshot, State, Update
from fedfusion_flwr.federation.sampling import stratified_cohort
from fedfusion_flwr.federation.strategy import FederatedStrategy
from fedfusion_flwr.fusion import (
    DistributionInference,
    FusionPosterior,
    InferenceError,
    NormalizationStatistics,
    StatisticsError,
    StatisticsMemory,
    balanced_mixture,
    client_weights,
    inhabited,
    prune_assignments,
)
from fedfusion_flwr.fusion.absent import AbsentComponents
from fedfusion_flwr.fusion.statistics import batchnorm_prefixes, normalization_layers
from fedfusion_flwr.models import ModelError
from fedfusion_flwr.randomness import derived_seed, numpy_generator
from fedfusion_flwr.strategies.coupling import CoupledRound, fuse_components, mixed_model, rounded


@dataclass
class FedFusionState:
    """What the server knows of its clients and their components.

    Attributes
    ----------
    inference : DistributionInference
        Goes on from its last fit.
    memory : StatisticsMemory
        Statistics and assignments of every client ever seen.
    absent : AbsentComponents
        The last steps of components, kept with ``absent = "remember"`` only.
    mixture : Tensor
        pi, (M,), as last used.
    posterior : FusionPosterior or None
        The last inference, over all clients in memory.
    width : int or None
        Length of a client's statistics.
    component_models : dict[int, State]
        w_m of the last round in which clients evaluated or component models trained on.
    """

    inference: DistributionInference
    memory: StatisticsMemory
    absent: AbsentComponents
    mixture: Tensor
    posterior: FusionPosterior | None = None
    width: int | None = None
    component_models: dict[int, State] = field(default_factory=dict)


@dataclass(frozen=True)
class _Beliefs:
    """The assignments of all known clients, without empty components."""

    clients: list[int]
    """K ids, ascending."""
    assignments: Tensor
    """b, (K, M)."""

    @cached_property
    def row(self) -> dict[int, int]:
        """The row of every client."""
        return {client: row for row, client in enumerate(self.clients)}

    def of(self, replies: Sequence[ClientReply]) -> Tensor:
        """The rows of b of these clients."""
        return self.assignments[[self.row[reply.client] for reply in replies]]


@dataclass(kw_only=True, eq=False, repr=False)
class FedFusion(FederatedStrategy):
    """Component-weighted aggregation with server-side inference; drop-in for Flower's FedAvg.

    Clients need no change: the statistics are read from the state dict they return, unless they
    send a ``normalization`` record of their own.

    Parameters
    ----------
    num_components : int
        M, the largest number of virtual components.
    mixture : {"inferred", "balanced", "counts"}
        How pi is chosen: as the posterior mean; proportional to (population
        share)^balance_exponent; or as the shares of this round's examples, which is FedAvg and
        exists as a control.
    balance_exponent : float
        rho in [0, 1] of the balanced mixture; 1 where clients form no clear groups.
    sampling : {"random", "stratified"}
        ``stratified`` draws cohorts in which components appear in proportion to pi, wherever
        clients form clear groups.
    absent : {"drop", "remember"}
        A component without clients in a round: renormalize pi over the others, or let it contribute
        its last pseudo-gradient (cf. FedVARP, Jhunjhunwala et al. 2022).
    assignment_smoothing : float
        In [0, 1): share of a client's earlier assignment that is kept at each inference.
    vae_step : int
        Number of rounds from one inference to the next; a new client triggers one, too.
    vae_steps, vae_refit_steps, vae_learning_rate
        Settings of the default inference; see `DistributionInference`.
    component_coupling, coupled_rounds : float, int
        In the last ``coupled_rounds`` rounds, where groups are clear, clients start from
        (1 - component_coupling) w + component_coupling w_m, and only component models change; see
        `coupling.CoupledRound`. 0 in either leaves all rounds to the global model.
    inference : DistributionInference or None
        Replaces the default inference; its number of components must be ``num_components``.
    """

    name = "fedfusion"
    server_step = True
    own_label_calibration = 0.5

    num_components: int = checked(8, at_least(1))
    mixture: Mixture = choice(Mixture, "balanced")
    balance_exponent: float = checked(0.5, between(0, 1))
    sampling: Sampling = choice(Sampling, "stratified")
    absent: Absent = choice(Absent, "drop")
    component_coupling: float = checked(0.0, between(0, 1))
    coupled_rounds: int = checked(0, at_least(0))
    assignment_smoothing: float = checked(0.5, DECAY)
    vae_step: int = checked(1, at_least(1))
    vae_steps: int = checked(200, at_least(1))
    vae_refit_steps: int = checked(10, at_least(1))
    vae_learning_rate: float = checked(2e-2, RATE)
    inference: DistributionInference | None = None
    state: FedFusionState = field(init=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._coupled: CoupledRound | None = None

    def initial(self) -> FedFusionState:
        """Nothing is known about the clients yet."""
        inference = self.inference or DistributionInference(
            self.num_components,
            derived_seed(self.seed, "inference"),
            steps=self.vae_steps,
            refit_steps=self.vae_refit_steps,
            learning_rate=self.vae_learning_rate,
        )
        if inference.num_components != self.num_components:
            raise ArgumentError(
                f"FedFusion: num_components = {self.num_components}, but the given inference has "
                f"{inference.num_components}"
            )
        uniform = torch.full((self.num_components,), 1 / self.num_components, dtype=torch.float64)
        memory = StatisticsMemory(self.assignment_smoothing)
        return FedFusionState(inference, memory, AbsentComponents(self.pool_moments), uniform)

    @classmethod
    def check_model(cls, config: RunConfig, model: nn.Module, examples: Tensor) -> None:
        """Refuse a model without statistics where ``statistics-source`` looks for them."""
        normalization = config.model_normalization
        to_batch = "" if normalization == "batch" else 'normalization = "batch", '
        remedy = f'{to_batch}another model or a strategy without statistics, such as "fedavg"'
        named = f"model = {config.model!r} with normalization = {normalization!r}"
        needs = f"strategy = {config.strategy!r} needs normalization statistics"
        if next(normalization_layers(model), None) is None:
            raise ModelError(f"{needs}, and {named} has no normalization layer; use {remedy}")
        if config.statistics_source == "probe":
            try:
                layers = config.statistics_layers
                NormalizationStatistics.probe(model, [examples], layers=layers)
            except StatisticsError as problem:
                raise ModelError(
                    f"{needs}, and {named} cannot be probed: {problem}; use {remedy}"
                ) from problem
        elif not batchnorm_prefixes(model.state_dict()):
            raise ModelError(
                f"{needs}, and {named} has no BatchNorm layer for statistics-source = 'local' to "
                f'read; use statistics-source = "probe", {remedy}'
            )

    def sample_clients(self, server_round: int, clients: list[int], size: int) -> list[int]:
        """Random, or with clear groups in proportion to the mixture."""
        if self.sampling == "random" or not self._groups_are_clear():
            return super().sample_clients(server_round, clients, size)
        memory = self.state.memory
        known = self._known()
        main = memory.assignments(known).argmax(1).tolist()
        generator = numpy_generator(self.seed, "stratified-sampling", server_round)
        component_of = dict(zip(known, main, strict=True))
        mixture = self.state.mixture.tolist()
        return stratified_cohort(clients, size, component_of, mixture, generator)

    def prepare_round(self, clients: list[int], exchange: Exchange) -> None:
        """Whether the component models train on in this round, in place of the shared one."""
        self._coupled = None
        if self._may_couple(self.server_round) and self._groups_are_clear():
            beliefs = self._beliefs()
            shares = dict(zip(beliefs.clients, beliefs.assignments.tolist(), strict=True))
            models, coupling = self.state.component_models, self.component_coupling
            self._coupled = CoupledRound(self, shares, models, coupling)

    def sent_to(self, client: int) -> State:
        """The global model; in a coupled round on the way from it to the client's components."""
        return self._coupled.start_of(client) if self._coupled else self.current

    def _may_couple(self, server_round: int) -> bool:
        """Whether it is one of the last rounds, which ``coupled_rounds`` counts."""
        last = self.num_rounds - self.coupled_rounds < server_round <= self.num_rounds
        return self.component_coupling > 0 and last

    def advance(self, replies: list[ClientReply]) -> Update:
        """Infer, choose the mixture, weigh this round's clients, and fuse."""
        if self._coupled:
            # Groups are known by now; statistics from other starting models do not compare.
            return self._coupled.advance(replies)
        with Timer() as timer:
            try:
                metrics = self._infer(replies)
            except InferenceError as problem:
                log(
                    WARNING,
                    "round %d: inference failed (%s); example weights are used",
                    *(self.server_round, problem),
                )
                update = self.weighted_update(replies, weights_by_examples(replies))
                return _with(update, {"fusion-fallback": 1.0})
            beliefs = self._beliefs()
            here = beliefs.of(replies)
            examples = torch.tensor([r.num_examples for r in replies], dtype=torch.float64)
            self.state.mixture = mixture = self._choose_mixture(beliefs, here, examples)
            # A component that clients here belong to only slightly is not sampled: it is absent.
            present = mixture if self.mixture == "counts" else mixture * inhabited(here)
            weights = client_weights(here, present, examples)
        stand_ins: list[tuple[State, float]] = []
        if self.absent == "remember":
            ghosts, shares = self.state.absent.recall(here, mixture, self.current)
            stand_ins = list(zip(ghosts, shares, strict=True))
            metrics["components-remembered"] = float(len(ghosts))
        clients = [reply.client for reply in replies]
        smoothed = self.state.memory.assignments(clients).tolist()
        assignments = {i: rounded(row) for i, row in zip(clients, smoothed, strict=True)}
        update = self.weighted_update(
            replies, weights, stand_ins=stand_ins, assignments=assignments
        )
        # From here on the round counts.
        states = [reply.state for reply in replies]
        couples_next = self._may_couple(self.server_round + 1)
        if self.evaluates(self.server_round) or couples_next:
            if couples_next:
                # A component absent from this round starts from the shared model, not an old one.
                self.state.component_models.clear()
            self.state.component_models |= fuse_components(self, replies, here, examples)
        if self.absent == "remember":
            self.state.absent.remember(states, here, examples, self.current)
        own_share = 1 - sum(share for _, share in stand_ins)
        snapshot = self._snapshot(beliefs, update, own_share)
        main = snapshot.posterior.assignments.argmax(1).tolist()
        metrics |= {"fusion-fallback": 0.0, "components-occupied": float(len(set(main)))}
        clusters = dict(zip(beliefs.clients, main, strict=True))
        seconds = {"infer": timer.seconds}
        return dataclasses.replace(
            _with(update, metrics), clusters=clusters, fusion=snapshot, seconds=seconds
        )

    def prepare_evaluation(self) -> None:
        """Look once at who belongs where, for all clients that are evaluated."""
        self._at_evaluation = self._beliefs()

    def personal_model(self, client: int) -> State:
        """sum_m b_km w_m, the client's mixture of component models, where clients form groups.

        The served global model where they do not, for clients unknown to the inference, and for
        clients whose components have no model yet.
        """
        row = self._at_evaluation.row.get(client)
        if row is None or not self._groups_are_clear():
            return self.served
        shares = self._at_evaluation.assignments[row].tolist()
        return mixed_model(self, self.served, self.state.component_models, shares)

    def models(self) -> dict[str, State]:
        """The component models, ``m0``, ``m1``, ..."""
        return {f"m{m}": state for m, state in sorted(self.state.component_models.items())}

    def num_channels(self) -> int | None:
        """Also known for other normalization layers, once the first round has shown it."""
        return super().num_channels() or (self.state.width // 4 if self.state.width else None)

    def _infer(self, replies: list[ClientReply]) -> dict[str, float]:
        """Bring memory and posterior up to date; the metrics of the inference, if there was one."""
        state, received, described = self.state, None, replies
        if batchnorm_prefixes(self.current):
            received = self._read(self.current).vector(log_std=True)
        else:
            # A client without a record must not end the run; from the next round on it is dropped.
            described = [reply for reply in replies if reply.statistics is not None] or replies
        vectors = {r.client: self._statistics(r).vector(log_std=True) for r in described}
        widths = Counter(len(vector) for vector in vectors.values())
        if state.width is None:
            state.width = widths.most_common(1)[0][0]
        if len(described) < len(replies):
            raise InferenceError("some clients sent no normalization record")
        if set(widths) != {state.width}:
            raise InferenceError(f"clients' statistics differ in length: {sorted(widths)}")
        memory = state.memory
        examples = {r.client: r.num_examples for r in replies}
        memory.remember(self.server_round, vectors, examples, received)
        newcomers = any(c.assignment is None for c in memory.clients.values())
        due = (self.server_round - 1) % self.vae_step == 0
        if not (newcomers or due or state.posterior is None):
            return {}
        posterior = state.inference.fit(
            memory.vectors(),
            memory.num_examples(),
            rounds=memory.rounds(),
            residuals=memory.residuals,
        )
        state.posterior = memory.absorb(posterior)
        return {"elbo": state.posterior.elbo}

    def _known(self) -> list[int]:
        """The clients that have been through an inference: one that failed leaves newcomers out."""
        memory = self.state.memory
        return [i for i in memory.ids if memory.clients[i].assignment is not None]

    def _beliefs(self) -> _Beliefs:
        known = self._known()
        if not known:
            return _Beliefs([], torch.empty(0))
        return _Beliefs(known, prune_assignments(self.state.memory.assignments(known)))

    def _choose_mixture(self, beliefs: _Beliefs, here: Tensor, examples: Tensor) -> Tensor:
        """pi, (M,), from the assignments of all clients or of this round's."""
        if self.mixture == "inferred":
            assert self.state.posterior is not None
            return self.state.posterior.mixture
        if self.mixture == "counts":
            mass = examples @ here
            return mass / mass.sum()
        population = self.state.memory.num_examples() @ beliefs.assignments
        # Without groups there is nothing to balance: the clients' own shares.
        exponent = self.balance_exponent if self._groups_are_clear() else 1.0
        return balanced_mixture(population, exponent)

    def _groups_are_clear(self) -> bool:
        posterior = self.state.posterior
        return posterior is not None and posterior.clear_groups

    def _statistics(self, reply: ClientReply) -> NormalizationStatistics:
        return reply.statistics or self._read(reply.state)

    def _read(self, state: State) -> NormalizationStatistics:
        try:
            return NormalizationStatistics.from_state_dict(state, layers=self.statistics_layers)
        except StatisticsError as problem:
            raise StatisticsError(f"FedFusion cannot run on this model: {problem}") from problem

    def _snapshot(self, beliefs: _Beliefs, update: Update, own_share: float) -> FusionSnapshot:
        state = self.state
        assert state.posterior is not None
        weights = torch.zeros(len(beliefs.clients), dtype=torch.float64)
        for row in update.rows:
            assert row.client is not None
            weights[beliefs.row[row.client]] = row.weight * own_share
        return FusionSnapshot(
            beliefs.clients, state.posterior, state.mixture, weights, state.memory.vectors()
        )

    def settings(self) -> Iterable[str]:
        """Components, mixture and sampling."""
        mixture: str = self.mixture
        if mixture == "balanced":
            mixture = f"balanced (exponent {self.balance_exponent:g})"
        yield (
            f"Fusion: {self.num_components} components, mixture {mixture}, sampling {self.sampling}"
        )
        if self.component_coupling and self.coupled_rounds:
            yield (
                f"Component models: train on in the last {self.coupled_rounds} rounds, coupling "
                f"{self.component_coupling:g}"
            )


def _with(update: Update, metrics: dict[str, float]) -> Update:
    return dataclasses.replace(update, metrics={**update.metrics, **metrics})
