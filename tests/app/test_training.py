# SPDX-License-Identifier: Apache-2.0
"""The local loops, on problems whose answers are known."""

from __future__ import annotations

import math
from collections import OrderedDict
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fedfusion_flwr.app.training import (
    evaluate,
    measure_running_statistics,
    shuffled_batches,
    train,
)
from fedfusion_flwr.computation import TrainingError, choose_device, place_model
from fedfusion_flwr.errors import FedFusionError
from fedfusion_flwr.randomness import torch_generator
from tests.support import assert_identical, tiny_model

SETTINGS: dict[str, Any] = {
    "epochs": 1,
    "batch_size": 8,
    "learning_rate": 0.1,
    "momentum": 0.0,
    "weight_decay": 0.0,
}


def fit(model: nn.Module, x: Tensor, y: Tensor, seed: int = 0, **changes: Any) -> float:
    generator = torch_generator(seed, "training", 1)
    return train(model, x, y, generator=generator, **(SETTINGS | changes)).loss


def copied(model: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}


def inputs_of(layer: nn.Module) -> list[Tensor]:
    """A list that collects what the layer is given."""
    seen: list[Tensor] = []
    layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach().clone()))
    return seen


def blobs(count: int = 40) -> tuple[Tensor, Tensor]:
    """Two separable classes in the plane."""
    generator = torch.Generator().manual_seed(5)
    y = torch.arange(count) % 2
    x = torch.randn(count, 2, generator=generator) + 5.0 * y[:, None]
    return x, y


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 100), st.integers(2, 20))
def test_batches_cover_everything_once(count: int, batch_size: int) -> None:
    batches = list(shuffled_batches(count, batch_size, torch.Generator().manual_seed(0)))
    assert sorted(torch.cat(batches).tolist()) == list(range(count))
    assert all(len(batch) in (batch_size, batch_size + 1) for batch in batches[:-1])
    assert all(len(batch) > 1 for batch in batches) or count == 1


@pytest.mark.parametrize(
    ("count", "sizes"),
    [(8, [4, 4]), (9, [4, 5]), (10, [4, 4, 2]), (5, [5]), (4, [4]), (3, [3]), (1, [1]), (0, [])],
)
def test_a_single_last_example_joins_the_previous_batch(count: int, sizes: list[int]) -> None:
    batches = shuffled_batches(count, 4, torch.Generator().manual_seed(0))
    assert [len(batch) for batch in batches] == sizes


def test_epochs_are_shuffled_differently() -> None:
    generator = torch.Generator().manual_seed(0)
    first, second = (torch.cat(list(shuffled_batches(50, 8, generator))) for _ in range(2))
    assert not torch.equal(first, second)


def test_one_step_by_hand() -> None:
    # Zero logits on two classes: softmax 1/2, so the gradient of the logits is (-1/2, 1/2).
    model = nn.Linear(1, 2)
    nn.init.zeros_(model.weight)
    nn.init.zeros_(model.bias)
    x, y = torch.tensor([[2.0], [2.0]]), torch.tensor([0, 0])
    loss = fit(model, x, y, learning_rate=0.1)
    assert loss == pytest.approx(math.log(2))
    assert model.bias.tolist() == pytest.approx([0.05, -0.05])
    assert model.weight.flatten().tolist() == pytest.approx([0.1, -0.1])


def test_momentum_and_weight_decay_by_hand() -> None:
    # Constant inputs of zero leave the weight's loss gradient at zero: only decay moves it.
    model = nn.Linear(1, 2, bias=False)
    nn.init.ones_(model.weight)
    x, y = torch.zeros(4, 1), torch.tensor([0, 1, 0, 1])
    fit(model, x, y, batch_size=2, learning_rate=0.1, momentum=0.5, weight_decay=1.0)
    # step 1: v = 1, w = 0.9; step 2: v = 0.5 + 0.9, w = 0.9 - 0.14
    assert model.weight.flatten().tolist() == pytest.approx([0.76, 0.76])


def test_loss_is_the_mean_over_the_last_epoch() -> None:
    model = nn.Linear(2, 2)
    x, y = blobs(9)
    before, _ = evaluate(model, x, y)
    loss = fit(model, x, y, batch_size=4, learning_rate=1e-12, epochs=3)
    assert loss == pytest.approx(before)


@pytest.mark.parametrize("fused", [False, True])
def test_loss_falls(fused: bool) -> None:
    model = tiny_model()
    x, y = blobs()
    before, _ = evaluate(model, x, y)
    losses = [fit(model, x, y, epochs=3, momentum=0.9, fused_normalization=fused) for _ in range(3)]
    after, accuracy = evaluate(model, x, y)
    assert losses[-1] < losses[0]
    assert after < 0.5 * before
    assert accuracy > 0.9


@pytest.mark.parametrize("fused", [False, True])
def test_deterministic(fused: bool) -> None:
    states = []
    for seed in (0, 0, 1):
        model = tiny_model()
        fit(model, *blobs(), seed, epochs=2, fused_normalization=fused)
        states.append(model.state_dict())
    assert_identical(states[0], states[1])
    assert not torch.equal(states[0]["fc.weight"], states[2]["fc.weight"])


def test_data_and_global_generator_are_not_changed() -> None:
    x, y = blobs()
    copies = x.clone(), y.clone()
    model, state = tiny_model(), torch.get_rng_state()
    fit(model, x, y)
    assert torch.equal(x, copies[0])
    assert torch.equal(y, copies[1])
    assert torch.equal(torch.get_rng_state(), state)


def test_too_few_examples() -> None:
    assert issubclass(TrainingError, FedFusionError)
    with pytest.raises(TrainingError, match="no training examples"):
        fit(tiny_model(), *blobs(0))
    x, y = blobs(1)
    with pytest.raises(TrainingError, match=r"one training example.*min-partition-size"):
        fit(tiny_model(), x, y)
    assert math.isfinite(fit(tiny_model(), x, y, fused_normalization=True))
    assert math.isfinite(fit(nn.Linear(2, 2), x, y))


@pytest.mark.parametrize("bad", ["data", "rate"])
def test_loss_that_is_not_finite(bad: str) -> None:
    x, y = blobs()
    if bad == "data":
        x[3, 0] = math.nan
    rate = 3e38 if bad == "rate" else 0.1
    sentence = r"non-finite in local epoch [123].*lower learning-rate"
    with pytest.raises(TrainingError, match=sentence):
        fit(nn.Linear(2, 2), x, y, learning_rate=rate, epochs=3)


def one_norm() -> nn.Sequential:
    """BatchNorm as the first layer, with received statistics mean (1, -1), variance (4, 9)."""
    model = nn.Sequential(OrderedDict(norm=nn.BatchNorm1d(2, eps=1e-12), out=nn.Linear(2, 2)))
    norm, out = model[0], model[1]
    assert isinstance(norm, nn.BatchNorm1d)
    assert isinstance(out, nn.Linear)
    with torch.no_grad():
        norm.running_mean.copy_(torch.tensor([1.0, -1.0]))  # type: ignore[union-attr]
        norm.running_var.copy_(torch.tensor([4.0, 9.0]))  # type: ignore[union-attr]
        out.weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
        out.bias.zero_()
    return model


def test_fused_normalization_uses_the_received_statistics() -> None:
    x, y = torch.tensor([[3.0, 2.0], [3.0, 2.0]]), torch.tensor([0, 0])
    # (3 - 1) / 2 = (2 + 1) / 3 = 1: equal logits. Batch statistics would give 0 and 0.
    model = one_norm()
    seen = inputs_of(model[1])
    loss = fit(model, x, y, fused_normalization=True)
    assert torch.allclose(seen[0], torch.ones(2, 2))
    assert loss == pytest.approx(math.log(2))
    # The affine parameters are trained: d loss / d scale = (-1/2, 1/2) times the input 1.
    assert model.norm.weight.tolist() == pytest.approx([1.05, 0.95])  # type: ignore[union-attr]
    assert model.norm.bias.tolist() == pytest.approx([0.05, -0.05])  # type: ignore[union-attr]


def test_batch_normalization_uses_the_batch() -> None:
    model = one_norm()
    seen = inputs_of(model[1])
    fit(model, torch.tensor([[3.0, 2.0], [5.0, 8.0]]), torch.tensor([0, 1]))
    assert seen[0].abs().allclose(torch.ones(2, 2))


def test_running_statistics_after_fused_training_are_those_of_the_data() -> None:
    x, y = blobs(700)  # more than one evaluation batch
    model = one_norm()
    fit(model, x, y, fused_normalization=True)
    norm = model[0]
    assert torch.allclose(norm.running_mean, x.mean(0))  # type: ignore[arg-type]
    assert torch.allclose(norm.running_var, x.var(0))  # type: ignore[arg-type]
    assert norm.num_batches_tracked.item() == 0  # type: ignore[union-attr]


@pytest.mark.parametrize("fused", [False, True])
def test_frozen_entries_stay_as_they_are(fused: bool) -> None:
    """Including statistics and counters of a frozen normalization layer; the others change."""
    x, y = blobs()
    model = tiny_model()
    before = copied(model)
    frozen = {key for key in before if key.startswith(("fc.", "norm."))}
    fit(model, x, y, frozen=frozen, fused_normalization=fused)
    moved = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert moved == {"out.weight", "out.bias"}
    # The next training, with nothing frozen, trains everything.
    fit(model, x, y)
    moved = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert moved == set(before)


def test_frozen_normalization_uses_its_own_statistics() -> None:
    """So that one example is enough, as with fused statistics."""
    x, y = torch.tensor([[3.0, 2.0]]), torch.tensor([0])
    model = one_norm()
    frozen = {"norm.running_mean", "norm.running_var", "norm.num_batches_tracked"}
    seen = inputs_of(model[1])
    fit(model, x, y, frozen=frozen)
    assert torch.allclose(seen[0], torch.ones(1, 2))


def test_statistics_under_the_served_parameters_belong_together() -> None:
    """1,100 sorted examples: the first layer's are all inputs' moments, in which the parts agree.

    Those of the second are of what the first, normalized by its new statistics, passes on.
    """
    x = torch.linspace(-1, 3, 1100).unsqueeze(1) * torch.tensor([1.0, -2.0])
    first, second = nn.BatchNorm1d(2), nn.BatchNorm1d(2)
    with torch.no_grad():
        first.weight.copy_(torch.tensor([2.0, 3.0]))
        first.bias.copy_(torch.tensor([5.0, -1.0]))
        first.running_mean.fill_(40.0)  # type: ignore[union-attr]
    model = nn.Sequential(first, second)
    measure_running_statistics(model, x, batch_statistics=True)
    assert torch.allclose(first.running_mean, x.mean(0))  # type: ignore[arg-type]
    assert torch.allclose(first.running_var, x.var(0))  # type: ignore[arg-type]
    assert torch.allclose(second.running_mean, first.bias, atol=1e-4)  # type: ignore[arg-type]
    assert torch.allclose(second.running_var, first.weight**2, rtol=2e-3)  # type: ignore[arg-type]
    assert not model.training
    assert not first.training


def test_measured_statistics_of_images() -> None:
    layer = nn.BatchNorm2d(3)
    x = torch.randn(4, 3, 5, 6, generator=torch.Generator().manual_seed(0)) * 2 + 1
    measure_running_statistics(nn.Sequential(layer), x)
    columns = x.movedim(1, -1).reshape(-1, 3)
    assert torch.allclose(layer.running_mean, columns.mean(0))  # type: ignore[arg-type]
    assert torch.allclose(layer.running_var, columns.var(0))  # type: ignore[arg-type]


def test_evaluation_by_hand() -> None:
    model = nn.Identity()
    logits = torch.tensor([[math.log(3), 0.0], [0.0, 0.0], [0.0, math.log(3)]])
    loss, accuracy = evaluate(model, logits, torch.tensor([0, 0, 0]))
    # probabilities of class 0: 3/4, 1/2, 1/4; the tie goes to the first class
    assert loss == pytest.approx(-(math.log(3 / 4) + math.log(1 / 2) + math.log(1 / 4)) / 3)
    assert accuracy == pytest.approx(2 / 3)


def test_evaluation_in_parts_and_without_side_effects() -> None:
    model = tiny_model().train()
    before = copied(model)
    x, y = blobs(1100)
    loss, accuracy = evaluate(model, x, y)
    with torch.no_grad():
        logits = model.eval()(x)
    assert loss == pytest.approx(float(nn.functional.cross_entropy(logits, y)), rel=1e-5)
    assert accuracy == pytest.approx(float((logits.argmax(1) == y).double().mean()))
    assert_identical(model.state_dict(), before)


def test_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("auto").type == choose_device("cpu").type == "cpu"
    with pytest.raises(TrainingError, match="use device = 'auto'"):
        choose_device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert choose_device("auto").type == choose_device("cuda").type == "cuda"


def test_convolutions_are_channels_last() -> None:
    model = place_model(nn.Sequential(nn.Conv2d(2, 3, 3)), torch.device("cpu"))
    assert model[0].weight.is_contiguous(memory_format=torch.channels_last)  # type: ignore[index]
