# SPDX-License-Identifier: Apache-2.0
"""What the server does with an aggregate: a momentum step, and an average for serving."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from fedfusion_flwr.fusion.state_dicts import State, fuse_state_dicts, is_parameter


@dataclass
class ServerStep:
    """w <- w + rate * v with v <- momentum * v + (aggregate - w); Hsu et al. 2019 (FedAvgM).

    With rate 1 and momentum 0 the result is the aggregate, bit for bit. Buffers are replaced.

    Parameters
    ----------
    learning_rate : float
        Positive.
    momentum : float
        In [0, 1).
    """

    learning_rate: float = 1.0
    momentum: float = 0.0
    velocity: State = field(default_factory=dict)

    @property
    def is_identity(self) -> bool:
        """Whether the step returns its aggregate unchanged."""
        return self.learning_rate == 1.0 and self.momentum == 0.0

    def __call__(self, current: State, aggregate: State) -> State:
        """The next global model."""
        if self.is_identity:
            return aggregate
        stepped = dict(aggregate)
        for key, value in aggregate.items():
            if not is_parameter(key, value):
                continue
            start = current[key].double()
            step = value.double() - start
            # In place, because a velocity is twice as large as its model.
            velocity = self.velocity.setdefault(key, torch.zeros_like(step))
            velocity.mul_(self.momentum).add_(step)
            stepped[key] = start.add(velocity, alpha=self.learning_rate).to(value.dtype)
        return stepped


@dataclass
class ServedAverage:
    """Exponential moving average of the global models, whose decay rises with their number.

    a_0 = w_0;  a_t = d_t a_{t-1} + (1 - d_t) w_t with d_t = min(d, (1 + t) / (10 + t)), t being the
    number of models before (the warm-up of TensorFlow's ``ExponentialMovingAverage``): a short run
    is not served its own beginning. Normalization statistics are averaged as moments.

    Parameters
    ----------
    decay : float
        d in [0, 1); 0 serves the newest model itself.
    """

    decay: float = 0.0
    count: int = 0
    state: State = field(default_factory=dict)
    exact: State = field(default_factory=dict)

    def update(self, model: State) -> State:
        """Add a new global model and return the one to serve."""
        decay = min(self.decay, (1 + self.count) / (10 + self.count))
        self.count += 1
        if self.decay == 0.0:
            self.state = {key: value.clone() for key, value in model.items()}
            return self.state
        # In float64: a model's own type would round small steps towards the newest away.
        exact = {k: v.double() if v.is_floating_point() else v for k, v in model.items()}
        if self.count == 1:
            self.exact = {key: value.clone() for key, value in exact.items()}
        else:
            weights = torch.tensor([decay, 1 - decay], dtype=torch.float64)
            self.exact = fuse_state_dicts([self.exact, exact], weights)
        self.state = {key: self.exact[key].to(value.dtype) for key, value in model.items()}
        return self.state
