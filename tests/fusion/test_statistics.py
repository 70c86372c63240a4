# SPDX-License-Identifier: Apache-2.0
"""Normalization parameters: reading, probing and pooling them."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fedfusion_flwr.fusion import NormalizationStatistics, StatisticsError, pooled_moments
from fedfusion_flwr.models import build_model
from tests.fusion.tensors import many

EPS = 1e-5


@pytest.mark.parametrize(
    ("means", "variances", "weights", "mean", "variance"),
    [
        # (-2 + 2) / 2 = 0; E[x^2] = ((1 + 4) + (1 + 4)) / 2 = 5, where averaging would say 1
        ((-2, 2), (1, 1), (7, 7), 0, 5),
        # p = (1/4, 3/4): (0 + 3 * 4) / 4 = 3; (2 + 9) / 4 + 3 (6 + 1) / 4 = 8
        ((0, 4), (2, 6), (10, 30), 3, 8),
        # without weight a client does not count
        ((1, 900), (2, 5), (3, 0), 1, 2),
    ],
)
def test_two_clients_pool_by_hand(
    means: tuple[float, ...],
    variances: tuple[float, ...],
    weights: tuple[int, ...],
    mean: float,
    variance: float,
) -> None:
    columns = torch.tensor([means, variances], dtype=torch.float32).unsqueeze(2)
    pooled = pooled_moments(*columns, torch.tensor(weights))
    assert [(moment.dtype, moment.tolist()) for moment in pooled] == [
        (torch.float64, [mean]),
        (torch.float64, [variance]),
    ]


@many
@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=6),
    channels=st.integers(1, 4),
    seed=st.integers(0, 2**31),
)
def test_pooling_groups_equals_the_moments_of_all_their_data(
    sizes: list[int], channels: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    groups = [rng.normal(rng.normal(0, 5), rng.uniform(0.1, 4), (size, channels)) for size in sizes]
    mean, variance = pooled_moments(
        torch.as_tensor(np.stack([g.mean(0) for g in groups])),
        torch.as_tensor(np.stack([g.var(0) for g in groups])),
        torch.tensor(sizes),
    )
    everything = np.concatenate(groups)
    np.testing.assert_allclose(mean.numpy(), everything.mean(0), rtol=1e-10, atol=1e-10)
    np.testing.assert_allclose(variance.numpy(), everything.var(0), rtol=1e-10, atol=1e-10)


finite = st.floats(-1e4, 1e4)
client = st.tuples(finite, st.floats(0, 1e4), st.floats(1e-3, 1e6))


@many
@given(st.lists(client, min_size=1, max_size=8))
def test_pooled_mean_lies_in_the_hull_and_variance_above_the_average(
    clients: list[tuple[float, float, float]],
) -> None:
    means, variances, weights = (
        torch.tensor(c, dtype=torch.float64) for c in zip(*clients, strict=True)
    )
    mean, variance = pooled_moments(means[:, None], variances[:, None], weights)
    room = 1e-9 * (1 + means.abs().max())
    assert means.min() - room <= mean.item() <= means.max() + room
    average = float((weights / weights.sum()) @ variances)
    assert variance.item() >= average * (1 - 1e-12)


def test_pooling_does_not_depend_on_the_order_of_clients() -> None:
    means, variances, n = torch.eye(6), torch.arange(36.0).view(6, 6), torch.arange(1.0, 7.0)
    order = torch.tensor([3, 5, 0, 2, 4, 1])
    forward = pooled_moments(means, variances, n)
    shuffled = pooled_moments(means[order], variances[order], n[order])
    torch.testing.assert_close(forward, shuffled, rtol=1e-12, atol=1e-12)


def test_small_spread_around_a_huge_mean_keeps_its_digits() -> None:
    """Means 1e8 +- 1e-3, variance 1e-6: pooled 1e-6 + 1e-6. E[x^2] - mean^2 at 1e16 loses all."""
    means = torch.tensor([[1e8 - 1e-3], [1e8 + 1e-3]], dtype=torch.float64)
    _, variance = pooled_moments(means, torch.full((2, 1), 1e-6), torch.ones(2))
    assert variance.item() == pytest.approx(2e-6, rel=1e-4)


@pytest.mark.parametrize(
    ("means", "variances", "weights"),
    [((2, 3), (2, 4), 2), ((2, 3), (3, 3), 2), ((2, 3), (2, 3), 3)],
)
def test_shapes_that_do_not_fit_are_named(
    means: tuple[int, int], variances: tuple[int, int], weights: int
) -> None:
    with pytest.raises(ValueError, match=r"do not fit \(K, C\)"):
        pooled_moments(torch.zeros(means), torch.ones(variances), torch.ones(weights))


# --- from_state_dict and vector -------------------------------------------------------------------


def nested() -> nn.Module:
    """BatchNorm of 2, 3 (without affine parameters) and 1 channels, one of them nested."""
    return nn.Sequential(
        nn.Conv2d(1, 2, 1),
        nn.BatchNorm2d(2),
        nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3, affine=False)),
        nn.BatchNorm1d(1),
    )


def filled(model: nn.Module) -> dict[str, Tensor]:
    state = model.state_dict()
    state["1.running_mean"] = torch.tensor([1.0, 2.0])
    state["1.running_var"] = torch.tensor([4.0, 9.0])
    state["1.bias"] = torch.tensor([0.1, 0.2])
    state["1.weight"] = torch.tensor([1.5, 2.5])
    state["2.1.running_mean"] = torch.tensor([3.0, 4.0, 5.0])
    state["2.1.running_var"] = torch.tensor([16.0, 25.0, 36.0])
    state["3.running_mean"] = torch.tensor([6.0])
    state["3.running_var"] = torch.tensor([49.0])
    return state


def test_every_nested_layer_is_read_in_order() -> None:
    statistics = NormalizationStatistics.from_state_dict(filled(nested()), eps=0)
    assert statistics.mean.tolist() == [1, 2, 3, 4, 5, 6]
    assert statistics.std.tolist() == [2, 3, 4, 5, 6, 7]
    torch.testing.assert_close(statistics.shift, torch.tensor([0.1, 0.2, 0, 0, 0, 0]))
    torch.testing.assert_close(statistics.scale, torch.tensor([1.5, 2.5, 1, 1, 1, 1]))


def test_ends_reads_the_first_and_the_last_layer() -> None:
    statistics = NormalizationStatistics.from_state_dict(filled(nested()), layers="ends", eps=0)
    assert statistics.mean.tolist() == [1, 2, 6]
    assert statistics.std.tolist() == [2, 3, 7]


def test_standard_deviation_includes_epsilon() -> None:
    """sqrt(0 + 1e-5) = 0.0031623; sqrt(3.99999 + 1e-5) = 2."""
    state = {"running_mean": torch.zeros(2), "running_var": torch.tensor([0.0, 3.99999])}
    std = NormalizationStatistics.from_state_dict(state).std
    assert std.tolist() == pytest.approx([0.0031622776, 2.0])


def test_vector_is_mean_std_shift_scale() -> None:
    plain = torch.tensor([1, 2, 3, math.e, 5, 6, 7, 8])
    statistics = NormalizationStatistics(*plain.split(2))
    assert torch.equal(statistics.vector(), plain)
    expected = torch.tensor([1, 2, math.log(3), 1, 5, 6, 7, 8])
    torch.testing.assert_close(statistics.vector(log_std=True), expected)


def test_log_std_of_a_dead_channel_is_finite() -> None:
    zero = torch.zeros(1)
    vector = NormalizationStatistics(zero, zero, zero, zero).vector(log_std=True)
    assert vector[1].item() == pytest.approx(math.log(1e-5))


@pytest.mark.parametrize(("name", "channels"), [("lenet", 48), ("resnet18", 4800)])
def test_channel_counts_of_the_built_in_models(name: str, channels: int) -> None:
    """LeNet 16 + 32. ResNet-18: stem 64; stages 4*64, 4*128 + 128, 4*256 + 256, 4*512 + 512."""
    state = build_model(name, (3, 32, 32), 10, seed=0).state_dict()
    statistics = NormalizationStatistics.from_state_dict(state)
    assert statistics.mean.shape == (channels,)
    assert statistics.vector().shape == (4 * channels,)


def test_reading_does_not_hand_out_the_state_dicts_own_memory() -> None:
    state = {"running_mean": torch.zeros(2), "running_var": torch.ones(2)}
    statistics = NormalizationStatistics.from_state_dict(state)
    state["running_mean"].fill_(9)
    assert statistics.mean.tolist() == [0, 0]


def test_model_without_running_statistics_names_the_remedy() -> None:
    state = nn.Sequential(nn.Linear(2, 2), nn.GroupNorm(1, 2)).state_dict()
    with pytest.raises(StatisticsError, match="statistics-source = 'probe'"):
        NormalizationStatistics.from_state_dict(state)


@pytest.mark.parametrize("shape", [(3,), (2, 1)])
def test_vectors_of_other_shapes_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(StatisticsError, match="vectors of one length"):
        NormalizationStatistics(*[torch.ones(2)] * 3, torch.ones(shape))


# --- probe ----------------------------------------------------------------------------------------


class Watched(nn.Module):
    """A norm layer behind a fixed map x -> 2x + 1, so that the layer's input is known."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.dropout = nn.Dropout(0.5)
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.dropout(2 * x + 1))


NORMS = [
    (lambda: nn.BatchNorm1d(2), "rows"),
    (lambda: nn.BatchNorm2d(2), "images"),
    (lambda: nn.BatchNorm2d(2, affine=False), "images"),
    (lambda: nn.GroupNorm(1, 2), "images"),
    (lambda: nn.LayerNorm(2), "tokens"),
    (lambda: nn.LayerNorm(2, elementwise_affine=False), "tokens"),
]
SHAPES = {"rows": (2, 2), "images": (2, 2, 1, 1), "tokens": (2, 1, 2)}


@pytest.mark.parametrize(("build", "kind"), NORMS)
def test_probe_gives_the_moments_of_the_layers_input(build: object, kind: str) -> None:
    """x = (0, 1), (4, 5) becomes (1, 3), (9, 11): means 5, 7; standard deviations 4, 4."""
    model = Watched(build())  # type: ignore[operator]
    affine = model.norm.weight is not None
    if affine:
        nn.init.constant_(model.norm.weight, 3.0)
        nn.init.constant_(model.norm.bias, 0.5)
    data = torch.tensor([[0.0, 1.0], [4.0, 5.0]]).reshape(SHAPES[kind])
    found = NormalizationStatistics.probe(model, [data])
    assert found.mean.tolist() == [5, 7]
    torch.testing.assert_close(found.std, torch.full((2,), math.sqrt(16 + EPS)))
    assert found.shift.tolist() == ([0.5, 0.5] if affine else [0, 0])
    assert found.scale.tolist() == ([3, 3] if affine else [1, 1])


def test_probe_counts_every_pixel_of_a_channel() -> None:
    """Channel 0 holds 2x + 1 of (0, 2, 0, 2): 1, 5, 1, 5: mean 3, std 2. Channel 1: all 1."""
    images = torch.zeros(1, 2, 2, 2)
    images[0, 0] = torch.tensor([[0.0, 2.0], [0.0, 2.0]])
    found = NormalizationStatistics.probe(Watched(nn.GroupNorm(2, 2)), [images])
    assert found.mean.tolist() == [3, 1]
    torch.testing.assert_close(found.std, torch.tensor([4 + EPS, EPS]).sqrt())


@settings(deadline=None, max_examples=15)
@given(cut=st.integers(1, 11), seed=st.integers(0, 1000))
def test_probe_does_not_depend_on_how_the_data_is_batched(cut: int, seed: int) -> None:
    data = torch.randn(12, 1, 8, 8, generator=torch.Generator().manual_seed(seed))
    model = build_model("lenet", (1, 8, 8), 3, seed=0)
    whole = NormalizationStatistics.probe(model, [data])
    split = NormalizationStatistics.probe(model, [data[:cut], data[cut:]])
    torch.testing.assert_close(whole.vector(), split.vector(), rtol=1e-5, atol=1e-6)


def test_probe_leaves_the_model_as_it_was() -> None:
    model = Watched(nn.BatchNorm1d(2)).train()
    model.dropout.eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    NormalizationStatistics.probe(model, [torch.randn(5, 2)])
    after = model.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert (model.training, model.norm.training, model.dropout.training) == (True, True, False)
    assert not model.norm._forward_pre_hooks
    assert model.norm.weight.grad is None


def test_probe_restores_the_model_after_a_failing_batch() -> None:
    model = Watched(nn.BatchNorm1d(2)).train()
    with pytest.raises(ValueError, match="expected 2D or 3D"):
        NormalizationStatistics.probe(model, [torch.zeros(1, 2, 1, 1)])
    assert model.training
    assert model.norm.training
    assert not model.norm._forward_pre_hooks


def test_probe_and_state_dict_agree_on_the_layers() -> None:
    model = build_model("resnet18", (3, 8, 8), 10, seed=0)
    data = [torch.zeros(2, 3, 8, 8)]
    for layers, channels in (("all", 4800), ("ends", 64 + 512)):
        probed = NormalizationStatistics.probe(model, data, layers=layers)
        read = NormalizationStatistics.from_state_dict(model.state_dict(), layers=layers)
        assert probed.mean.shape == read.mean.shape == (channels,)


def test_probe_without_data_or_without_layers_says_so() -> None:
    with pytest.raises(StatisticsError, match="no data passed"):
        NormalizationStatistics.probe(Watched(nn.BatchNorm1d(2)), [])
    with pytest.raises(StatisticsError, match="no normalization layer"):
        NormalizationStatistics.probe(nn.Linear(2, 2), [torch.zeros(1, 2)])
