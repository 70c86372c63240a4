# SPDX-License-Identifier: Apache-2.0
"""The bidirectional LSTM: padding changes nothing, and its statistics can be read and probed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from fedfusion_flwr.app.training import evaluate
from fedfusion_flwr.computation import place_model
from fedfusion_flwr.fusion import NormalizationStatistics, fuse_state_dicts
from fedfusion_flwr.models import BiLSTM, build_model
from tests.models.training import fit

WORDS = 30
SETTINGS = {"epochs": 4, "batch_size": 16, "learning_rate": 0.1, "weight_decay": 1e-4}


@pytest.fixture(scope="module")
def model() -> nn.Module:
    """Random weights, and statistics that are not the initial ones."""
    model = build_model("bilstm", (9,), 3, seed=0, vocabulary_size=WORDS)
    model.train()
    for seed in range(5):
        model(texts(20, 9, seed))
    return model.eval()


def texts(count: int, length: int, seed: int = 0) -> Tensor:
    """Texts of every length from 1 to ``length``, padded at their end."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(1, WORDS, (count, length), generator=generator)
    lengths = torch.arange(count) % length + 1
    return x.masked_fill(torch.arange(length) >= lengths[:, None], 0)


@contextmanager
def inputs_of(module: nn.Module) -> Iterator[list[Tensor]]:
    """Everything that a module is given meanwhile."""
    seen: list[Tensor] = []
    handle = module.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    yield seen
    handle.remove()


def labelled(count: int = 120) -> tuple[Tensor, Tensor]:
    """Two classes: word 1 or word 2 comes first."""
    x = texts(count, 6).clamp(max=9)
    x = torch.where((x > 0) & (x < 3), 3, x)
    y = torch.arange(count) % 2
    x[:, 0] = y + 1
    return x, y


@settings(max_examples=20, deadline=None)
@given(extra=st.integers(1, 40), count=st.integers(1, 20), seed=st.integers(0, 99))
def test_more_padding_changes_nothing(model: nn.Module, extra: int, count: int, seed: int) -> None:
    x = texts(count, 9, seed)
    with torch.no_grad():
        assert torch.equal(model(F.pad(x, (0, extra))), model(x))


def test_a_text_does_not_see_its_batch(model: nn.Module) -> None:
    x = texts(20, 9)
    with torch.no_grad():
        together = model(x)
        order = torch.randperm(20, generator=torch.Generator().manual_seed(1))
        torch.testing.assert_close(model(x[order]), together[order])
        alone = torch.cat([model(row[None]) for row in x])
    torch.testing.assert_close(alone, together)


def test_every_word_counts_in_both_directions(model: nn.Module) -> None:
    x = texts(9, 9)
    with torch.no_grad():
        logits = model(x)
        for position in range(9):
            changed = x.clone()
            changed[:, position] = torch.where(x[:, position] > 0, x[:, position] % 29 + 1, 0)
            differs = (model(changed) - logits).abs().amax(1) > 1e-6
            assert differs.tolist() == (x[:, position] > 0).tolist()
        # The order counts: this is no bag of words.
        assert not torch.allclose(model(x[8:].flip(1)), logits[8:])


def test_pooling_by_hand(model: nn.Module) -> None:
    assert isinstance(model, BiLSTM)
    x = torch.tensor([[5, 7, 2, 0]])
    with inputs_of(model.head) as seen, torch.no_grad():
        model(x)
        states, _ = model.lstm(model.embedding(x[:, :3]))
    torch.testing.assert_close(seen[0], torch.cat([states.amax(1), states.mean(1)], 1))


def test_an_empty_text_is_one_of_padding(model: nn.Module) -> None:
    with torch.no_grad():
        logits = model(torch.zeros(2, 4, dtype=torch.int64))
    assert logits.isfinite().all()


def test_padding_stays_zero_in_training_and_averaging() -> None:
    x, y = labelled()
    states = []
    for seed in range(2):
        model = build_model("bilstm", (6,), 2, seed=seed, vocabulary_size=WORDS)
        before = model.get_submodule("embedding").weight.detach().clone()  # type: ignore[operator]
        fit(model, x, y, seed=seed, **SETTINGS)
        after = model.state_dict()["embedding.weight"]
        assert not torch.equal(after[1:], before[1:])
        assert not after[0].any()
        states.append(model.state_dict())
    fused = fuse_state_dicts(states, torch.tensor([0.3, 0.7]))
    assert not fused["embedding.weight"][0].any()
    assert fused["embedding.weight"][1:].abs().amin(1).all()


@pytest.mark.parametrize("fused", [False, True])
def test_it_learns_and_repeats(fused: bool) -> None:
    x, y = labelled()
    losses = []
    for _ in range(2):
        model = build_model("bilstm", (6,), 2, seed=0, vocabulary_size=WORDS)
        model = place_model(model, torch.device("cpu"))
        losses.append(fit(model, x, y, fused_normalization=fused, **SETTINGS))
    assert losses[0] == losses[1]
    _, accuracy = evaluate(model, x, y)
    assert accuracy > 0.95


def test_statistics_of_the_head(model: nn.Module) -> None:
    local = NormalizationStatistics.from_state_dict(model.state_dict())
    assert local.mean.shape == (64,)
    with inputs_of(model.get_submodule("head.1")) as inputs:
        probed = NormalizationStatistics.probe(model, torch.split(texts(50, 9, seed=7), 16))
    values = torch.cat(inputs)
    torch.testing.assert_close(probed.mean, values.mean(0))
    expected = (values.var(0, unbiased=False) + 1e-5).sqrt()
    torch.testing.assert_close(probed.std, expected)
    assert not torch.allclose(probed.mean, local.mean)


def test_parameters() -> None:
    model = build_model("bilstm", (9,), 3, seed=0, vocabulary_size=WORDS)
    # 64 a word; two directions of 4 gates over 64 + 64 inputs with two biases; the head.
    lstm = 2 * (4 * 64 * (64 + 64) + 2 * 4 * 64)
    head = 256 * 64 + 2 * 64 + 64 * 3 + 3
    assert sum(p.numel() for p in model.parameters()) == WORDS * 64 + lstm + head
    assert model(texts(4, 9)).shape == (4, 3)
