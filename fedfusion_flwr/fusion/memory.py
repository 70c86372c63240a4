# SPDX-License-Identifier: Apache-2.0
"""What the server remembers of every client ever seen.

Raw statistics of different rounds cannot be compared, because the global model drifts: a client's
statistics are the round's level plus its own deviation and noise, d_kt = level_t + v_k + e_kt. The
level is the example-weighted mean of the cohort. Where one component happens to be frequent in a
cohort that mean is shifted, so the known deviations of its clients are subtracted first.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from fedfusion_flwr.fusion.inference import FusionPosterior

FULL_COHORT = 4
"""The smallest cohort whose own mean is trusted as the centre."""
MOST_ROUNDS = 50
"""From then on a client's oldest rounds fade: its data may change."""
MOST_RESIDUALS = 512
"""The newest are kept: noise changes as training goes on."""


@dataclass
class ClientMemory:
    """One client: its mean deviation v_k (D,) over its rounds, examples, smoothed b_k (M,)."""

    vector: Tensor
    num_examples: int
    last_round: int
    rounds: int = 1
    assignment: Tensor | None = None


@dataclass
class StatisticsMemory:
    """Centred statistics and smoothed assignments, keyed by client id.

    Parameters
    ----------
    smoothing : float
        In [0, 1): share of a client's earlier assignment that is kept at each inference, against
        flicker between components. 0 takes the newest posterior as it is.
    """

    smoothing: float = 0.0
    clients: dict[int, ClientMemory] = field(default_factory=dict)
    residuals: Tensor | None = None
    """Draws of one round's noise, (R, D), float32, the newest last; None before there are any."""

    @property
    def ids(self) -> list[int]:
        """Known client ids, ascending: the row order of every matrix here."""
        return sorted(self.clients)

    def remember(
        self,
        server_round: int,
        vectors: dict[int, Tensor],
        num_examples: dict[int, int],
        received: Tensor | None = None,
    ) -> None:
        """Store one round's statistics, centred on its cohort.

        Parameters
        ----------
        server_round : int
            The round the statistics belong to.
        vectors : dict[int, Tensor]
            Statistics (D,) by client id.
        num_examples : dict[int, int]
            Examples by client id.
        received : Tensor or None
            The statistics (D,) of the model that this cohort received. In cohorts of fewer than
            four clients the centre is shrunk towards it, because the mean of two says little.
        """
        if not vectors:
            return
        ids = sorted(vectors)
        stacked = torch.stack([vectors[i].double() for i in ids])
        n = torch.tensor([num_examples[i] for i in ids], dtype=torch.float64)
        known = torch.tensor([i in self.clients for i in ids])
        # A newcomer's deviation is unknown, not 0: with enough others it has no say in the level.
        voters = known if int(known.sum()) >= FULL_COHORT else torch.ones_like(known)
        unseen = torch.zeros_like(stacked[0])
        earlier = [self.clients[i].vector if i in self.clients else unseen for i in ids]
        share = n * voters
        center = (share / share.sum()) @ (stacked - torch.stack(earlier))
        if received is not None and len(ids) < FULL_COHORT:
            trust = len(ids) / FULL_COHORT
            center = trust * center + (1 - trust) * received.double()
        residuals: list[Tensor] = []
        for client, row in zip(ids, (stacked - center).float(), strict=True):
            memory = self.clients.get(client)
            if memory is None:
                self.clients[client] = ClientMemory(row, num_examples[client], server_round)
                continue
            # The new row minus the mean of T earlier ones has (T + 1) / T of a row's covariance.
            seen = memory.rounds
            surprise = row - memory.vector
            residuals.append(surprise * (seen / (seen + 1)) ** 0.5)
            memory.vector = memory.vector + surprise / (seen + 1)
            memory.rounds = min(seen + 1, MOST_ROUNDS)
            memory.num_examples = num_examples[client]
            memory.last_round = server_round
        if len(residuals) >= FULL_COHORT:
            # An error of the level is common to the cohort, and no noise of its clients; that of a
            # small cohort is too large to be told from noise.
            new = torch.stack(residuals)
            new = (new - new.mean(0)) * (len(new) / (len(new) - 1)) ** 0.5
            kept = [] if self.residuals is None else [self.residuals]
            self.residuals = torch.cat([*kept, new])[-MOST_RESIDUALS:]

    def vectors(self) -> Tensor:
        """Centred statistics of all known clients, (K, D), float32."""
        return torch.stack([self.clients[i].vector for i in self.ids])

    def rounds(self) -> Tensor:
        """How many rounds each row of `vectors` is the mean of, (K,), int64."""
        return torch.tensor([self.clients[i].rounds for i in self.ids])

    def num_examples(self) -> Tensor:
        """Examples of all known clients, (K,), float64."""
        return torch.tensor([self.clients[i].num_examples for i in self.ids], dtype=torch.float64)

    def absorb(self, posterior: FusionPosterior) -> FusionPosterior:
        """Align a posterior over all known clients with the past, with smoothed assignments."""
        width = posterior.assignments.shape[1]
        earlier = [self.clients[i].assignment for i in self.ids]
        zero = torch.zeros(width, dtype=torch.float64)
        reference = torch.stack([zero if a is None else a for a in earlier])
        aligned = align_components(posterior, reference) if reference.any() else posterior
        for row, client in enumerate(self.ids):
            new, old = aligned.assignments[row], earlier[row]
            mixed = new if old is None else self.smoothing * old + (1 - self.smoothing) * new
            self.clients[client].assignment = mixed
        return replace(aligned, assignments=self.assignments(self.ids))

    def assignments(self, ids: list[int]) -> Tensor:
        """Smoothed assignments of the given clients, (len(ids), M), float64.

        Raises
        ------
        KeyError
            If a client is unknown or has not been through an inference.
        """
        rows: list[Tensor] = []
        for client in ids:
            assignment = self.clients[client].assignment
            if assignment is None:
                raise KeyError(f"client {client} has no assignment yet")
            rows.append(assignment)
        return torch.stack(rows)


def align_components(posterior: FusionPosterior, reference: Tensor) -> FusionPosterior:
    """Renumber components to overlap most with earlier assignments of the same clients.

    Parameters
    ----------
    posterior : FusionPosterior
        With assignments (K, M).
    reference : Tensor
        Earlier assignments (K, M); zero rows for clients that had none.
    """
    # Imported here because clients import this package too, and scipy takes long.
    from scipy.optimize import linear_sum_assignment

    overlap = reference.double().T @ posterior.assignments
    _, order = linear_sum_assignment(overlap.numpy(), maximize=True)
    index = torch.as_tensor(order)
    return replace(
        posterior,
        assignments=posterior.assignments[:, index],
        mixture=posterior.mixture[index],
        components=posterior.components[index],
    )
