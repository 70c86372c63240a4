# SPDX-License-Identifier: Apache-2.0
"""Last pseudo-gradients of components, for the rounds in which none of their clients takes part."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fedfusion_flwr.fusion.aggregation import (
    component_coefficients,
    inhabited,
)
from fedfusion_flwr.fusion.state_dicts import State, fuse_state_dicts, is_parameter


@dataclass
class AbsentComponents:
    """Remembers, for every component, its last step and running statistics.

    Costs one model per component in memory and one fusion per present component and round; cf.
    FedVARP (Jhunjhunwala et al. 2022), which keeps one step per client.

    Parameters
    ----------
    pool_moments : bool
        As in `fuse_state_dicts`.
    """

    pool_moments: bool = True
    last: dict[int, State] = field(default_factory=dict)

    def remember(
        self,
        states: Sequence[State],
        assignments: Tensor,
        num_examples: Tensor,
        current: State,
    ) -> None:
        """Store w_m - w for the components inhabited by this cohort; buffers as they are."""
        coefficients = component_coefficients(assignments, num_examples)
        for m in torch.nonzero(inhabited(assignments)).flatten().tolist():
            component = fuse_state_dicts(states, coefficients[m], pool_moments=self.pool_moments)
            self.last[m] = {
                key: value - current[key] if is_parameter(key, value) else value
                for key, value in component.items()
            }

    def recall(
        self, assignments: Tensor, mixture: Tensor, current: State
    ) -> tuple[list[State], list[float]]:
        """Models that absent components would have sent, and their weights pi_m.

        Components that were never present have none; their mass stays with the others.
        """
        present = inhabited(assignments)
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
