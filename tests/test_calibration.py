# SPDX-License-Identifier: Apache-2.0
"""The calibrated loss and the label prior, by hand and by their properties."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from fedfusion_flwr import calibrated_cross_entropy, label_log_prior
from fedfusion_flwr.app.training import evaluate_with_prior, train
from fedfusion_flwr.errors import FedFusionError
from fedfusion_flwr.randomness import torch_generator

counts_of_classes = st.lists(st.integers(0, 1000), min_size=1, max_size=20).filter(any)


def numbers(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_prior_by_hand() -> None:
    """Three of four examples are of class 0: (3/4 + 0.01) / 1.02 and (1/4 + 0.01) / 1.02."""
    prior = label_log_prior(torch.tensor([3, 1])).exp()
    assert prior.tolist() == pytest.approx([0.76 / 1.02, 0.26 / 1.02])
    # A class that the client does not have keeps a small part.
    assert label_log_prior(torch.tensor([5.0, 0.0])).exp()[1] == pytest.approx(0.01 / 1.02)


@settings(max_examples=100, deadline=None)
@given(counts_of_classes, st.integers(1, 50))
def test_prior_is_a_distribution_that_depends_on_the_ratios_alone(
    counts: list[int], factor: int
) -> None:
    prior = label_log_prior(torch.tensor(counts))
    assert prior.shape == (len(counts),)
    assert float(prior.double().exp().sum()) == pytest.approx(1, abs=1e-6)
    torch.testing.assert_close(label_log_prior(torch.tensor(counts) * factor), prior)
    order = torch.tensor(counts).argsort()
    assert bool((prior[order].diff() >= 0).all())


def test_prediction_that_the_prior_turns() -> None:
    """log(0.91 / 0.11) = 2.11 beats a lead of 2, and not one of 2.2."""
    prior = label_log_prior(torch.tensor([9, 1]))
    logits = torch.tensor([[0.0, 2.0], [0.0, 2.2]])
    assert logits.argmax(1).tolist() == [1, 1]
    assert (logits + prior).argmax(1).tolist() == [0, 1]
    found = evaluate_with_prior(nn.Identity(), logits, torch.tensor([0, 1]), prior)
    assert (found.accuracy, found.prior_accuracy) == (0.5, 1.0)
    expected = (F.softplus(torch.tensor(2.0)) + F.softplus(torch.tensor(-2.2))) / 2
    assert found.loss == pytest.approx(float(expected))


@pytest.mark.parametrize("tau", [0.0, 0.5, 1.0])
def test_gradient_by_hand(tau: float) -> None:
    """At equal logits the model's probabilities are q^tau over their sum."""
    logits = torch.zeros(1, 2, requires_grad=True)
    calibrated_cross_entropy(logits, torch.tensor([0]), torch.tensor([3, 1]), tau).backward()
    first, second = (0.76 / 1.02) ** tau, (0.26 / 1.02) ** tau
    share = second / (first + second)
    assert logits.grad is not None
    assert logits.grad[0].tolist() == pytest.approx([-share, share])


def test_a_training_step_by_hand() -> None:
    """From zero: the bias moves by the rate times the mean gradient of three examples."""
    model = nn.Linear(1, 2)
    nn.init.zeros_(model.weight)
    nn.init.zeros_(model.bias)
    x, y = torch.zeros(4, 1), torch.tensor([0, 0, 0, 1])
    counts = torch.tensor([3, 1])
    train(
        *(model, x, y),
        epochs=1,
        batch_size=8,
        learning_rate=1.0,
        momentum=0.0,
        weight_decay=0.0,
        generator=torch_generator(0, "training", 1),
        criterion=functools.partial(calibrated_cross_entropy, label_counts=counts, tau=1.0),
    )
    # Class 0 already has the probability 0.76 / 1.02 that it has in the data, but for eps: the
    # model need not learn the label frequencies. Plain cross-entropy would move it by 0.25.
    step = 0.75 - 0.76 / 1.02
    assert model.bias.tolist() == pytest.approx([step, -step], abs=1e-7)
    assert abs(step) < 0.005


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 10), st.floats(0, 3))
def test_equal_label_counts_or_no_tau_are_plain_cross_entropy(
    seed: int, classes: int, tau: float
) -> None:
    logits, targets = numbers(seed, 5, classes), torch.arange(5) % classes
    plain = F.cross_entropy(logits, targets)
    equal = calibrated_cross_entropy(logits, targets, torch.full((classes,), 7), tau)
    torch.testing.assert_close(equal, plain)
    skewed = torch.arange(classes) + 1.0
    assert torch.equal(calibrated_cross_entropy(logits, targets, skewed, 0.0), plain)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10**6), st.lists(st.integers(1, 1000), min_size=2, max_size=10))
def test_tau_1_is_the_balanced_softmax_of_the_smoothed_counts(seed: int, counts: list[int]) -> None:
    """n_y exp f_y / sum_j n_j exp f_j, with n_y + eps n in place of n_y."""
    logits, target = numbers(seed, 1, len(counts)), seed % len(counts)
    loss = calibrated_cross_entropy(logits, torch.tensor([target]), torch.tensor(counts), 1.0)
    masses = [
        (n + 0.01 * sum(counts)) * math.exp(f) for n, f in zip(counts, logits[0], strict=True)
    ]
    assert float(loss) == pytest.approx(-math.log(masses[target] / sum(masses)), rel=1e-4)


@pytest.mark.parametrize(
    ("counts", "tau", "sentence"),
    [
        ([0.0, 0.0], 0.5, "label_counts = .* is not allowed: .* not all 0"),
        ([1.0, -1.0], 0.5, "label_counts = .* none negative"),
        ([1.0, math.nan], 0.5, "label_counts = .* one number for each class"),
        ([[1.0, 1.0]], 0.5, "label_counts = .* one number for each class"),
        ([1.0, 1.0, 1.0], 0.5, "label_counts of 3 classes are not allowed: the logits have 2"),
        ([1.0, 1.0], -0.5, "tau = -0.5 is not allowed: at least 0"),
        ([1.0, 1.0], math.nan, "tau = nan is not allowed"),
    ],
)
def test_bad_arguments_give_one_sentence(counts: list[float], tau: float, sentence: str) -> None:
    with pytest.raises(ValueError, match=f"^{sentence}") as caught:
        calibrated_cross_entropy(torch.zeros(1, 2), torch.tensor([0]), torch.tensor(counts), tau)
    assert isinstance(caught.value, FedFusionError)
    assert "\n" not in str(caught.value)
