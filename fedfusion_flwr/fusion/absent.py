# SPDX-License-Identifier: Apache-2.0
"""Last pseudo-gradients of components, for rounds without any of their clients."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fedfusion_flwr.fusion.aggregation import component_coefficients, inhabited
from fedfusion_flwr.fusion.state_dicts import State, fuse_state_dicts, is_parameter


@dataclass
class AbsentComponents:
    """Remembers the last step and the running statistics of every component.

    Costs the memory of one model per component, and one fusion per present component and round;
    cf. FedVARP (Jhunjhunwala et al. 2022), which keeps one step per client.

    Parameters
    ----------
    pool_moments : bool
        As in `fuse_state_dicts`.
    """

    pool_moments: bool = True
    last: dict[int, State] = field(default_factory=dict)

    def remember(
        self, states: Sequence[State], assignments: Tensor, num_examples: Tensor, current: State
    ) -> None:
        """Store w_m - w of the components that this cohort inhabits; buffers as they are."""
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

        A component that was never present has none, and the others keep its mass.
        """
        present = inhabited(assignments)
        absent = [m for m in sorted(self.last) if not present[m] and mixture[m] > 0]
        ghosts = [
            {k: current[k] + v if is_parameter(k, v) else v for k, v in self.last[m].items()}
            for m in absent
        ]
        return ghosts, [float(mixture[m]) for m in absent]
