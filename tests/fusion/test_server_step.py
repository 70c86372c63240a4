# SPDX-License-Identifier: Apache-2.0
"""From an aggregate to the next global model, and to the served one."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fedfusion_flwr.fusion import ServedAverage, ServerStep
from tests.fusion.tensors import f64, layer, values

# --- ServerStep -----------------------------------------------------------------------------------


def test_rate_one_without_momentum_returns_the_aggregate_bit_for_bit() -> None:
    """.1 + (.3 - .1) is not .3 in floating point: the step must not compute it."""
    step = ServerStep()
    for _ in range(2):
        stepped = step(layer(0.1, 0.1, 0.1), layer(0.3, 0.3, 0.3, 4))
        assert values(stepped) == values(layer(0.3, 0.3, 0.3, 4))
    assert step.is_identity
    assert not step.velocity


def test_momentum_over_three_rounds_by_hand() -> None:
    """Rate 1/2, momentum 1/2, aggregates 4, 4, 0 from w = 0.

    v = 4, w = 2; v = (4 - 2) + 4/2 = 4, w = 4; v = (0 - 4) + 4/2 = -2, w = 3.
    """
    step = ServerStep(learning_rate=0.5, momentum=0.5)
    model, path = layer(0.0, 0.0, 1.0), []
    for aggregate in (4.0, 4.0, 0.0):
        model = step(model, layer(aggregate, aggregate, 1.0))
        path.append(model["0.weight"].item())
    assert path == [2.0, 4.0, 3.0]


def test_statistics_and_counters_are_replaced_not_stepped() -> None:
    stepped = ServerStep(0.5, 0.9)(layer(0.0, 0.0, 1.0, 3), layer(2.0, 8.0, 5.0, 9))
    assert values(stepped) == values(layer(1.0, 8.0, 5.0, 9))


def test_step_leaves_both_models_alone_and_keeps_the_type() -> None:
    current, aggregate = layer(0.0, 0.0, 1.0), layer(2.0, 8.0, 5.0)
    step = ServerStep(0.5, 0.9)
    for _ in range(2):
        stepped = step(current, aggregate)
        assert stepped["0.weight"].dtype == torch.float32
    assert values(current) == values(layer(0.0, 0.0, 1.0))
    assert values(aggregate) == values(layer(2.0, 8.0, 5.0))


# --- ServedAverage --------------------------------------------------------------------------------


def test_average_of_two_models_weighs_them_one_to_two() -> None:
    """d = 1/2: weights d (1 - d) / (1 - d^2) = 1/3 and 2/3; 3 and 9 give 7.

    Means 0 and 3 with variances 1 and 4: mean 2; E[x^2] = (1 + 0) / 3 + 2 (4 + 9) / 3 = 9; var 5.
    """
    average = ServedAverage(0.5)
    assert values(average.update(layer(3.0, 0.0, 1.0, 5))) == values(layer(3.0, 0.0, 1.0, 5))
    served = values(average.update(layer(9.0, 3.0, 4.0, 6)))
    assert served == pytest.approx(values(layer(7.0, 2.0, 5.0, 6)))


def test_average_follows_its_weights_over_many_models() -> None:
    """After t models, model i counts d^(t-i) (1 - d) / (1 - d^t)."""
    decay, models = 0.8, [1.0, -2.0, 5.0, 0.0, 7.0]
    average = ServedAverage(decay)
    for value in models:
        served = average.update({"w": f64(value)})
    t = len(models)
    shares = [decay ** (t - i) * (1 - decay) / (1 - decay**t) for i in range(1, t + 1)]
    assert sum(shares) == pytest.approx(1)
    assert served["w"].item() == pytest.approx(np.dot(shares, models), rel=1e-12)


def test_no_decay_serves_the_newest_model() -> None:
    average = ServedAverage()
    for value in (3.0, 0.1):
        served = average.update(layer(value, value, 1.0))
        assert values(served) == values(layer(value, value, 1.0))


def test_updating_the_average_leaves_the_models_alone() -> None:
    average, models = ServedAverage(0.5), [layer(3.0, 0.0, 1.0), layer(9.0, 3.0, 4.0)]
    for model in models:
        average.update(model)
    assert [values(m) for m in models] == [values(layer(3.0, 0.0, 1.0)), values(layer(9, 3, 4))]
