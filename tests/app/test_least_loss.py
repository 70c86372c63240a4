# SPDX-License-Identifier: Apache-2.0
"""How a client chooses among models: by its training loss, without side effects."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedfusion_flwr.app.training import EVALUATION_BATCH, least_loss
from tests.support import assert_identical

State = dict[str, Tensor]


def data(count: int = 40) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(count, 6, generator=generator)
    return x, x[:, :3].argmax(1)


def network(seed: int = 0, dropout: float = 0.0) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Dropout(dropout), nn.Linear(5, 3)
        )


def state(seed: int, batches: int = 3) -> State:
    """A model whose statistics depend on its seed, after ``batches`` batches."""
    made = network(seed).state_dict()
    made["1.running_mean"] = torch.full((5,), 0.1 * seed)
    made["1.num_batches_tracked"] = torch.tensor(batches)
    return made


def loss_of(model_state: Mapping[str, Tensor], *, training: bool = False) -> float:
    model = network()
    model.load_state_dict(model_state)
    model.train(training)
    x, y = data()
    with torch.no_grad():
        return float(F.cross_entropy(model(x), y))


@pytest.mark.parametrize("first", range(6))
@pytest.mark.parametrize("untrained", [False, True])
def test_it_is_the_brute_force_argmin(first: int, untrained: bool) -> None:
    """Models that have seen no batch are judged with the statistics of the examples."""
    states = [state(seed, 0 if untrained else 3) for seed in range(first, first + 5)]
    losses = [loss_of(s, training=untrained) for s in states]
    model = network()
    assert least_loss(model, states, *data()) == losses.index(min(losses))
    # The chosen model is loaded, and the evaluation has left no trace in it.
    assert_identical(model.state_dict(), states[losses.index(min(losses))])


def test_ties_go_to_the_first() -> None:
    assert least_loss(network(), [state(1), state(1), state(1)], *data()) == 0
    better, worse = sorted((state(1), state(2)), key=loss_of)
    assert least_loss(network(), [worse, better, better], *data()) == 1


@pytest.mark.parametrize("broken", [0, 1])
def test_a_model_without_a_finite_loss_is_never_chosen(broken: int) -> None:
    """Weights of 1e38 are finite and overflow in the first layer."""
    states = [state(1), state(2)]
    states[broken]["0.weight"] = torch.full((5, 6), 1e38)
    assert not torch.tensor(loss_of(states[broken])).isfinite()
    assert least_loss(network(), states, *data()) == 1 - broken


@pytest.mark.parametrize("batches", [0, 3])
def test_no_random_number_is_drawn(batches: int) -> None:
    """Dropout stays off also where the statistics of the examples are used."""
    states = [state(seed, batches) for seed in range(4)]
    torch.manual_seed(0)
    before = torch.get_rng_state()
    plain = least_loss(network(), states, *data())
    assert least_loss(network(dropout=0.9), states, *data()) == plain
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("count", [1, EVALUATION_BATCH + 1])
def test_a_single_example_has_no_statistics(count: int) -> None:
    """BatchNorm1d would raise on a batch of one."""
    x, y = data(count)
    assert least_loss(network(), [state(1, batches=0), state(2, batches=0)], x, y) in (0, 1)
