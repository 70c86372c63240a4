# SPDX-License-Identifier: Apache-2.0
"""Component models that train on by themselves beside the shared model, when groups are known.

Round t, shared model w, component models w_m, examples n_k, assignments b, coupling lambda:
  1. client k trains from (1 - lambda) w + lambda sum_m b_km w_m
  2. w_m <- sum_k (n_k b_km / B_m) w_k;   w stays

lambda = 1 is FedAvg in every component (clustered FedAvg of the inferred groups).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from logging import WARNING

import torch
from flwr.common.logger import log
from torch import Tensor

from fedfusion_flwr.federation.replies import ClientReply
from fedfusion_flwr.federation.round import KeepOldModel, State, Update
from fedfusion_flwr.federation.strategy import FederatedStrategy
from fedfusion_flwr.fusion import component_coefficients, inhabited


def mixed_model(
    strategy: FederatedStrategy,
    base: State,
    models: Mapping[int, State],
    shares: Sequence[float],
    coupling: float = 1.0,
) -> State:
    """(1 - coupling) base + coupling sum_m b_km w_m; running statistics as moments.

    Parameters
    ----------
    strategy : FederatedStrategy
        Fuses the models.
    base : State
        Also the answer for a client whose components have no model.
    models : Mapping[int, State]
        w_m by component. The shares of others are given to these.
    shares : Sequence[float]
        The client's row of b, (M,).
    coupling : float
        In [0, 1].
    """
    parts = {m: share for m, share in enumerate(shares) if share and m in models}
    if not parts or not coupling:
        return base
    states = [models[m] for m in parts]
    weights = torch.tensor(list(parts.values()), dtype=torch.float64)
    weights = coupling * (weights / weights.sum())
    if coupling < 1:
        states.append(base)
        weights = torch.cat([weights, 1 - weights.sum(0, keepdim=True)])
    return states[0] if len(states) == 1 else strategy.fuse(states, weights)


class CoupledRound:
    """One round in which component models train on and the shared model stays.

    Parameters
    ----------
    strategy : FederatedStrategy
        In that round.
    shares : Mapping[int, list[float]]
        Rows of b by client. Others train from the shared model, and count in no component.
    models : dict[int, State]
        w_m by component; `advance` updates it.
    coupling : float
        lambda in [0, 1].
    """

    def __init__(
        self,
        strategy: FederatedStrategy,
        shares: Mapping[int, list[float]],
        models: dict[int, State],
        coupling: float,
    ) -> None:
        self.strategy, self.shares = strategy, shares
        self.models, self.coupling = models, coupling
        self._starts: dict[tuple[float, ...], State] = {}

    def start_of(self, client: int) -> State:
        """What the client trains from; one object for clients with the same assignment."""
        row = tuple(self.shares.get(client, ()))
        if row not in self._starts:
            shared = self.strategy.current
            start = mixed_model(self.strategy, shared, self.models, row, self.coupling)
            self._starts[row] = start
        return self._starts[row]

    def advance(self, replies: Sequence[ClientReply]) -> Update:
        """Fuse the component models of this round's clients; clients have no weight in w.

        Raises
        ------
        KeepOldModel
            If no component's new model is plausible.
        """
        known = [reply for reply in replies if reply.client in self.shares]
        fused = self._fuse(known) if known else {}
        if known and not fused:
            raise KeepOldModel("no component's fused model was plausible")
        self.models |= fused
        main = {client: row.index(max(row)) for client, row in self.shares.items()}
        shown = {client: rounded(row) for client, row in self.shares.items()}
        rows = [reply.row(assignment=shown.get(reply.client)) for reply in replies]
        metrics = {
            "fusion-fallback": 0.0,
            "components-occupied": float(len(set(main.values()))),
            "components-coupled": float(len(fused)),
        }
        return Update(self.strategy.current, rows, metrics, clusters=main)

    def _fuse(self, replies: Sequence[ClientReply]) -> dict[int, State]:
        """The new models of the components that these clients belong to."""
        here = torch.tensor([self.shares[r.client] for r in replies], dtype=torch.float64)
        examples = torch.tensor([r.num_examples for r in replies], dtype=torch.float64)
        fused: dict[int, State] = {}
        for component, model in fuse_components(self.strategy, replies, here, examples).items():
            problem = self.strategy.objection(model, self.strategy.current)
            if problem:
                log(
                    WARNING,
                    "round %d: component %d keeps its old model; the fused one is implausible: %s",
                    *(self.strategy.server_round, component, problem),
                )
            else:
                fused[component] = model
        return fused


def rounded(row: Sequence[float]) -> list[float]:
    """A client's row of b, as rows of a round show it."""
    return [round(share, 6) for share in row]


def fuse_components(
    strategy: FederatedStrategy, replies: Sequence[ClientReply], here: Tensor, examples: Tensor
) -> dict[int, State]:
    """w_m = sum_k (n_k b_km / B_m) w_k of the components that are present.

    Parameters
    ----------
    strategy : FederatedStrategy
        Fuses the models.
    replies : Sequence[ClientReply]
        K replies of this round.
    here : Tensor
        Their rows of b, (K, M), float64.
    examples : Tensor
        n, (K,), float64.
    """
    states = [reply.state for reply in replies]
    coefficients = component_coefficients(here, examples)
    present = torch.nonzero(inhabited(here)).flatten().tolist()
    return {m: strategy.fuse(states, coefficients[m]) for m in present}
