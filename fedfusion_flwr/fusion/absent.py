# SPDX-License-Identifier: Apache-2.0
"""Last pseudo-gradients of components, for the rounds in which none of their clients takes part."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fedfusion_flwr.fusion.aggregation import component_coefficients, fuse_state_dicts
from fedfusion_flwr.fusion.server_step import State, is_parameter


class AbsentComponents:
    """Remembers, for every component, its last step and running statistics.

    Costs one model per component in memory and one fusion per present component and round; cf.
    FedVARP (Jhunjhunwala et al. 2022), which keeps one step per client.
    """

    def __init__(self) -> None:
        self.last: dict[int, State] = {}

    def remember(
        self,
        states: Sequence[State],
        assignments: Tensor,
        num_examples: Tensor,
        current: State,
        negligible_share: float,
    ) -> None:
        """Store w_m - w for the components that are present; buffers are stored as they are."""
        present = _present(assignments, num_examples, negligible_share)
        coefficients = component_coefficients(assignments, num_examples)
        for m in torch.nonzero(present).flatten().tolist():
            component = fuse_state_dicts(states, coefficients[m])
            self.last[m] = {
                key: value - current[key] if is_parameter(key, value) else value
                for key, value in component.items()
            }

    def recall(
        self,
        assignments: Tensor,
        num_examples: Tensor,
        mixture: Tensor,
        current: State,
        negligible_share: float,
    ) -> tuple[list[State], list[float]]:
        """Models that absent components would have sent, and their weights pi_m.

        Components that were never present have none; their mass stays with the others.
        """
        present = _present(assignments, num_examples, negligible_share)
        ghosts: list[State] = []
        weights: list[float] = []
        for m, last in sorted(self.last.items()):
            if bool(present[m]) or float(mixture[m]) <= 0:
                continue
            ghosts.append(
                {
                    key: current[key] + value if is_parameter(key, value) else value
                    for key, value in last.items()
                }
            )
            weights.append(float(mixture[m]))
        return ghosts, weights


def _present(assignments: Tensor, num_examples: Tensor, negligible_share: float) -> Tensor:
    mass = num_examples.double() @ assignments.double()
    return mass > negligible_share * mass.sum()
