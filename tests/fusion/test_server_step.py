# SPDX-License-Identifier: Apache-2.0
"""From an aggregate to the next global model, and to the served one."""

from __future__ import annotations

import pytest
import torch

from fedfusion_flwr.fusion import ServedAverage, ServerStep
from fedfusion_flwr.tracking.snapshot import capture, rebuild
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


def test_average_of_two_models_weighs_them_two_to_nine() -> None:
    """The second model's decay is 2/11, less than d: 0 and 11 give 9.

    Means 0 and 11 with variances 1 and 4: mean 9; E[x^2] = (2 (1 + 0) + 9 (4 + 121)) / 11 =
    1127/11; variance 1127/11 - 81 = 236/11.
    """
    average = ServedAverage(0.5)
    assert values(average.update(layer(0.0, 0.0, 1.0, 5))) == values(layer(0.0, 0.0, 1.0, 5))
    served = values(average.update(layer(11.0, 11.0, 4.0, 6)))
    assert served == pytest.approx(values(layer(9.0, 9.0, 236 / 11, 6)))


@pytest.mark.parametrize(
    ("decay", "models", "path"),
    [
        # Decays 2/11 and 3/12: weights 2/11 9/11, then 1/22 9/44 3/4.
        (0.8, [22.0, 44.0, 4.0], [22, 40, 13]),
        # From the third model on d is the smaller: weights 2/55 9/55 4/5.
        (0.2, [55.0, 55.0, 5.0], [55, 55, 15]),
        (0.2, [55.0, 110.0, 5.0], [55, 100, 24]),
    ],
)
def test_warm_up_weights_by_hand(decay: float, models: list[float], path: list[float]) -> None:
    average = ServedAverage(decay)
    served = [average.update({"w": f64(value)})["w"].item() for value in models]
    assert served == pytest.approx(path, rel=1e-12)


def test_decay_is_whole_from_the_36th_model_on() -> None:
    """(1 + 35) / (10 + 35) = 0.8: before, a unit step counts for more than 1 - d; then for 1 - d.

    Impulse: all models are 0 but the newest.
    """
    for before, expected in ((1, 9 / 11), (8, 0.5), (35, 0.2), (99, 0.2)):
        average = ServedAverage(0.8)
        for _ in range(before):
            average.update({"w": f64(0.0)})
        assert average.update({"w": f64(1.0)})["w"].item() == pytest.approx(expected)


def test_an_average_goes_on_where_it_was_interrupted() -> None:
    """Its count is part of its state: without it the decay would warm up again."""
    whole, first = ServedAverage(0.8), ServedAverage(0.8)
    models = [{"w": f64(value)} for value in (1.0, -2.0, 5.0, 0.0, 7.0)]
    for model in models[:3]:
        whole.update(model)
        first.update(model)
    trees, tensors = capture({"average": first})
    second = rebuild(trees["average"], tensors, ServedAverage(0.8))
    for model in models[3:]:
        assert values(whole.update(model)) == values(second.update(model))


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
