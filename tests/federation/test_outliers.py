# SPDX-License-Identifier: Apache-2.0
"""Robust statistics over clients: scores, bounds and caps by hand, and their properties."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedfusion_flwr.federation.bounds import squared_distance
from fedfusion_flwr.federation.outliers import (
    BATCHNORM_EPS,
    LEAST_SPREAD,
    MAD_TO_STD,
    cap_counts,
    clip_update,
    moments_of,
    next_bound,
    outlier_scores,
)
from tests.support import tiny_model

ONE = 1 - BATCHNORM_EPS
"""A variance whose log is 0 once epsilon is added."""


def layer(mean: list[float], variance: list[float]) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.tensor(mean), torch.tensor(variance)


@pytest.mark.parametrize(
    ("clients", "deviations"),
    [
        # Means with median 2; the deviations' median is 1.
        ([layer([m], [ONE]) for m in (0.0, 1.0, 2.0, 3.0, 10.0)], (2, 1, 0, 1, 8)),
        # Variances are scored by their logarithms, here -2 -1 0 1 5.
        ([layer([0.0], [math.exp(x) - BATCHNORM_EPS]) for x in (-2, -1, 0, 1, 5)], (2, 1, 0, 1, 5)),
    ],
)
def test_scores_of_one_channel_by_hand(
    clients: list[tuple[torch.Tensor, torch.Tensor]], deviations: tuple[int, ...]
) -> None:
    scores = outlier_scores([[client] for client in clients]).squeeze(1).tolist()
    assert scores == pytest.approx([d / MAD_TO_STD for d in deviations], rel=1e-5)


def test_a_layer_scores_the_root_mean_square_of_its_channels_and_layers_stand_alone() -> None:
    """Client 2 is 4 units out in one of four channels of the first layer: sqrt(16 / 4) = 2."""
    unit = LEAST_SPREAD  # times a standard deviation of 1; all others agree exactly
    shifts = ([0.0] * 4, [0.0] * 4, [0.0, 4 * unit, 0.0, 0.0])
    clients = [[layer(shift, [ONE] * 4), layer([0.0], [ONE])] for shift in shifts]
    torch.testing.assert_close(
        outlier_scores(clients), torch.tensor([[0, 0], [0, 0], [2, 0]], dtype=torch.float64)
    )


def test_small_differences_of_clients_that_agree_score_little() -> None:
    """Half a thousandth of a standard deviation is no outlier, however exactly the rest agrees."""
    clients = [[layer([0.0], [4.0])] for _ in range(9)] + [[layer([0.001], [4.0])]]
    assert float(outlier_scores(clients).max()) == pytest.approx(0.001 / (LEAST_SPREAD * 2), 1e-3)


@settings(max_examples=30, deadline=None)
@given(
    st.integers(4, 12), st.floats(0.1, 100), st.floats(-100, 100), st.integers(0, 1000), st.data()
)
def test_scores_do_not_depend_on_units_or_order(
    count: int, factor: float, shift: float, seed: int, data: st.DataObject
) -> None:
    generator = torch.Generator().manual_seed(seed)
    means = torch.randn(count, 3, generator=generator, dtype=torch.float64)
    variances = 1 + torch.rand(count, 3, generator=generator, dtype=torch.float64)
    scores = outlier_scores([[pair] for pair in zip(means, variances, strict=True)])
    moved = zip(factor * means + shift, factor**2 * variances, strict=True)
    # Epsilon, which is not scaled with them, is all that differs.
    torch.testing.assert_close(
        outlier_scores([[pair] for pair in moved]), scores, rtol=1e-2, atol=1e-2
    )
    order = data.draw(st.permutations(range(count)))
    shuffled = outlier_scores([[(means[k], variances[k])] for k in order])
    torch.testing.assert_close(shuffled, scores[list(order)])


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 9), st.integers(0, 1000), st.floats(1e3, 1e6))
def test_a_minority_cannot_hide_its_members(honest: int, seed: int, far: float) -> None:
    """Any number of colluders below half, all at one far place, score high; the honest do not."""
    generator = torch.Generator().manual_seed(seed)
    means = torch.randn(honest, 2, generator=generator)
    clients = [[(mean, torch.ones(2))] for mean in means]
    clients += [[(torch.full((2,), far), torch.ones(2))] for _ in range((honest - 1) // 2)]
    scores = outlier_scores(clients).squeeze(1)
    if honest > 2:
        # Deviations of the honest are at most 2 * their range around the median.
        assert float(scores[honest:].min()) > float(scores[:honest].max())


def test_moments_are_those_of_the_batchnorm_layers() -> None:
    state = tiny_model().state_dict()
    ((mean, variance),) = moments_of(state)
    assert torch.equal(mean, state["norm.running_mean"])
    assert torch.equal(variance, state["norm.running_var"])
    assert moments_of({"fc.weight": torch.ones(2)}) == []


def test_clipping_shortens_the_update_and_leaves_buffers() -> None:
    """(3, 4) has norm 5; at 2.5 half of it is left."""
    sent = {"w": torch.tensor([1.0, 1.0]), "n.running_mean": torch.zeros(1)}
    state = {"w": torch.tensor([4.0, 5.0]), "n.running_mean": torch.ones(1)}
    clipped = clip_update(state, sent, 5.0, 2.5)
    assert clipped["w"].tolist() == [2.5, 3.0]
    assert clipped["n.running_mean"] is state["n.running_mean"]
    assert clip_update(state, sent, 5.0, 5.0) == state


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 1000), st.floats(0.01, 100))
def test_a_clipped_update_is_never_longer_than_its_bound(seed: int, bound: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    sent = {"w": torch.randn(20, generator=generator)}
    state = {"w": sent["w"] + 10 * torch.randn(20, generator=generator)}
    norm = squared_distance(state, sent) ** 0.5
    shorter = squared_distance(clip_update(state, sent, norm, bound), sent) ** 0.5
    assert shorter == pytest.approx(min(norm, bound), rel=1e-4)


def test_the_bound_moves_by_the_share_of_norms_below_it() -> None:
    """3 of 4 norms are below 1.0; quantile 0.5 is reached too well: exp(-0.2 * 0.25)."""
    assert next_bound(1.0, [0.1, 0.2, 1.0, 1e30], 0.5) == pytest.approx(math.exp(-0.05))
    assert next_bound(1.0, [2.0, 3.0], 0.8) == pytest.approx(math.exp(0.16))


def test_the_bound_settles_at_the_quantile() -> None:
    norms = [float(n) for n in range(1, 101)]
    bound = 1000.0
    for _ in range(300):
        bound = next_bound(bound, norms, 0.8)
    assert 78 <= bound <= 82


def test_counts_are_capped_at_a_multiple_of_the_median() -> None:
    assert cap_counts([10, 20, 30, 1000], 3.0) == [10, 20, 30, 75]
    assert cap_counts([10, 20, 30], 3.0) == [10, 20, 30]
    assert cap_counts([5], 1.0) == [5]
    assert cap_counts([1, 1, 9], 1.5) == [1, 1, 1]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 10**7), min_size=3, max_size=20), st.floats(1, 10))
def test_a_cap_raises_nobody_and_leaves_half_alone(counts: list[int], ratio: float) -> None:
    capped = cap_counts(counts, ratio)
    assert all(1 <= new <= old for new, old in zip(capped, counts, strict=True))
    assert sum(new == old for new, old in zip(capped, counts, strict=True)) >= len(counts) / 2
