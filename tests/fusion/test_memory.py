# SPDX-License-Identifier: Apache-2.0
"""What is remembered of clients, and how components keep their names."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fedfusion_flwr.fusion import FusionPosterior, StatisticsMemory
from fedfusion_flwr.fusion.memory import MOST_RESIDUALS, MOST_ROUNDS, align_components
from tests.fusion.tensors import f64, many


def posterior(*rows: object) -> FusionPosterior:
    """Component m has mixture (m + 1) / 10 and decodes to m."""
    b = f64(*rows)
    m = torch.arange(b.shape[1], dtype=torch.float64)
    return FusionPosterior(b, (m + 1) / 10, m.unsqueeze(1), -1.5)


def remember(memory: StatisticsMemory, t: int, vectors: dict[int, float], **kwargs: object) -> None:
    """One feature per client, everybody with 10 examples."""
    rows = {client: f64(value) for client, value in vectors.items()}
    memory.remember(t, rows, dict.fromkeys(vectors, 10), **kwargs)  # type: ignore[arg-type]


def deviations(memory: StatisticsMemory) -> list[float]:
    return memory.vectors().squeeze(1).tolist()


# --- align_components -----------------------------------------------------------------------------


def test_components_take_the_names_of_the_earlier_ones_they_overlap() -> None:
    """Everything moves with its component: assignments, mixture and decoded statistics."""
    aligned = align_components(
        posterior([0, 0, 1], [0, 0, 1], [1, 0, 0], [0, 1, 0]),
        f64([1, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1]),
    )
    assert aligned.assignments.tolist() == [[1, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1]]
    assert aligned.mixture.tolist() == pytest.approx([0.3, 0.1, 0.2])
    assert aligned.components.flatten().tolist() == [2, 0, 1]
    assert aligned.elbo == -1.5


@many
@given(st.permutations(range(5)), st.integers(0, 100))
def test_a_renamed_posterior_is_renamed_back(order: list[int], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.cat([torch.arange(5), torch.randint(0, 5, (10,), generator=generator)])
    noise = 0.01 * torch.rand(15, 5, generator=generator, dtype=torch.float64)
    b = torch.nn.functional.one_hot(labels, 5).double() + noise
    original = posterior(*b.tolist())
    renamed = FusionPosterior(
        original.assignments[:, order], original.mixture[order], original.components[order], 0.0
    )
    back = align_components(renamed, original.assignments)
    assert torch.equal(back.assignments, original.assignments)
    assert torch.equal(back.mixture, original.mixture)
    assert torch.equal(back.components, original.components)


def test_clients_without_a_past_do_not_vote_on_the_names() -> None:
    """Two newcomers agree with column 0, the one known client was in component 1."""
    aligned = align_components(posterior([1, 0], [1, 0], [1, 0]), f64([0, 0], [0, 0], [0, 1]))
    assert aligned.assignments.tolist() == [[0, 1], [0, 1], [0, 1]]


# --- centring -------------------------------------------------------------------------------------


def test_a_first_cohort_is_centred_on_its_example_weighted_mean() -> None:
    """Examples 10, 70, 10, 10 of clients 0, 1, 3, 8: mean (10 + 140 + 30 + 20) / 100 = 2."""
    memory = StatisticsMemory()
    vectors = {k: f64(value, 7) for k, value in ((3, 3), (0, 1), (8, 2), (1, 2))}
    memory.remember(1, vectors, {3: 10, 0: 10, 8: 10, 1: 70})
    assert memory.ids == [0, 1, 3, 8]
    assert memory.vectors().tolist() == [[-1, 0], [0, 0], [1, 0], [0, 0]]
    assert memory.num_examples().tolist() == [10, 70, 10, 10]


def test_a_lopsided_cohort_does_not_shift_the_deviations() -> None:
    """True deviations -1 (0 to 3) and +1 (4 to 7), level 10 and then 50.

    Round 1 sees everybody. Round 2 sees three of the -1 and one +1: 49, 49, 49, 51, mean 49.5. Less
    the known deviations they are all 50, so the centre is 50 and nothing changes; centring on 49.5
    alone would say -1/2 and 3/2.
    """
    memory = StatisticsMemory()
    remember(memory, 1, {k: 9.0 if k < 4 else 11.0 for k in range(8)})
    assert deviations(memory) == [-1] * 4 + [1] * 4
    rows = {k: f64(v) for k, v in ((0, 49), (1, 49), (2, 49), (4, 51))}
    memory.remember(2, rows, dict.fromkeys(rows, 20))
    assert deviations(memory) == [-1] * 4 + [1] * 4
    assert [memory.clients[k].last_round for k in range(8)] == [2, 2, 2, 1, 2, 1, 1, 1]
    assert memory.num_examples().tolist() == [20, 20, 20, 10, 20, 10, 10, 10]


@many
@given(
    levels=st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=6),
    true=st.lists(st.floats(-5, 5), min_size=4, max_size=8),
)
def test_drift_of_the_global_model_cancels(levels: list[float], true: list[float]) -> None:
    """d_kt = level_t + v_k: after any levels the memory holds v_k minus the mean of v.

    Deviations are remembered in float32; centring rounds in float64, in proportion to the levels.
    """
    memory = StatisticsMemory()
    for t, level in enumerate(levels):
        remember(memory, t, {k: level + v for k, v in enumerate(true)})
    v = f64(*true)
    rounding = 1e-6 * float(v.abs().max()) + 1e-14 * max(map(abs, levels))
    found = memory.vectors().squeeze(1)
    torch.testing.assert_close(found, (v - v.mean()).float(), rtol=0, atol=rounding)


def test_a_deviation_is_the_mean_over_the_rounds() -> None:
    """Client 0 moves from far below the others to their level.

    Round 1: d = 7, 11, 11, 11, mean 10: v = -3, 1, 1, 1. Round 2: d = 11 for all, so d - v = 14,
    10, 10, 10, mean 11, and newest deviations 0: means -3/2 and 1/2. Round 3: d = 11 again,
    d - v = 12.5, 10.5, 10.5, 10.5, mean 11, deviations 0: means -3/3 and 1/3.
    """
    memory = StatisticsMemory()
    rounds = [
        (7.0, [-3, 1, 1, 1]),
        (11.0, [-1.5, 0.5, 0.5, 0.5]),
        (11.0, [-1, 1 / 3, 1 / 3, 1 / 3]),
    ]
    for server_round, (first, expected) in enumerate(rounds, start=1):
        remember(memory, server_round, {0: first, 1: 11.0, 2: 11.0, 3: 11.0})
        assert deviations(memory) == pytest.approx(expected)
    assert memory.rounds().tolist() == [3, 3, 3, 3]


def test_a_client_that_stayed_away_keeps_its_mean_and_its_number_of_rounds() -> None:
    memory = StatisticsMemory()
    remember(memory, 1, dict(enumerate([-1.0, -1.0, 1.0, 1.0, 0.0])))
    for server_round in (2, 3):
        remember(memory, server_round, dict(enumerate([-1.0, -1.0, 1.0, 1.0])))
    assert memory.rounds().tolist() == [3, 3, 3, 3, 1]
    assert deviations(memory) == pytest.approx([-1, -1, 1, 1, 0])


def test_old_rounds_fade_after_fifty() -> None:
    """Deviations 1 for fifty rounds and then 0, in a world of one pair: 1 becomes 50/51."""
    memory = StatisticsMemory()
    for server_round in range(MOST_ROUNDS + 5):
        remember(memory, server_round, {0: 1.0, 1: -1.0})
    assert memory.rounds().tolist() == [MOST_ROUNDS] * 2
    for visit in (1, 2):
        remember(memory, 60 + visit, {0: 0.0, 1: 0.0})
        assert deviations(memory)[0] == pytest.approx((50 / 51) ** visit)
    assert memory.rounds().tolist() == [MOST_ROUNDS] * 2


# --- residuals ------------------------------------------------------------------------------------


def test_residuals_have_the_size_of_one_rounds_noise() -> None:
    """A row minus the mean of T others varies as (T + 1) / T rows, so it counts sqrt(T / (T + 1)).

    Their mean over the cohort of four, 0 here, is taken off, which leaves 3/4 of the variance.
    Round 2, T = 1: rows 3 and -3 against 1 and -1, 2 sqrt(1/2); the means become 2 and -2.
    Round 3, T = 2: rows 5 and -5 against those, 3 sqrt(2/3).
    """
    memory = StatisticsMemory()

    def round_of(number: int, size: float) -> None:
        remember(memory, number, {0: size, 1: -size, 2: size, 3: -size})

    round_of(1, 1.0)
    assert memory.residuals is None
    round_of(2, 3.0)
    assert memory.residuals is not None
    second = 2 * (1 / 2 * 4 / 3) ** 0.5
    expected = [second, -second] * 2
    assert memory.residuals.flatten().tolist() == pytest.approx(expected)
    round_of(3, 5.0)
    third = 3 * (2 / 3 * 4 / 3) ** 0.5
    expected += [third, -third] * 2
    assert memory.residuals.flatten().tolist() == pytest.approx(expected)


def test_an_error_of_the_level_is_no_residual() -> None:
    """All four rows rise by 7: the level rose, and nobody deviates."""
    memory = StatisticsMemory()
    remember(memory, 1, {0: 1.0, 1: -1.0, 2: 3.0, 3: -3.0})
    remember(memory, 2, {0: 8.0, 1: 6.0, 2: 10.0, 3: 4.0})
    assert memory.residuals is not None
    assert memory.residuals.flatten().tolist() == pytest.approx([0.0] * 4, abs=1e-6)


def test_cohorts_below_four_leave_no_residuals() -> None:
    memory = StatisticsMemory()
    for number in (1, 2, 3):
        remember(memory, number, {0: 1.0 * number, 1: -1.0 * number, 2: 0.0})
    assert memory.residuals is None


def test_the_newest_512_residuals_are_kept() -> None:
    """Each of 100 clients leaves one in each round but its first; a change of sides is
    far from 0."""
    memory = StatisticsMemory()
    signs = [1.0 if k < 50 else -1.0 for k in range(100)]
    for server_round in range(1, 8):
        remember(memory, server_round, dict(enumerate(signs)))
        held = 0 if memory.residuals is None else len(memory.residuals)
        assert held == min(100 * (server_round - 1), MOST_RESIDUALS)
    remember(memory, 8, {k: -sign for k, sign in enumerate(signs)})
    assert memory.residuals is not None
    assert memory.residuals.dtype == torch.float32
    changed = memory.residuals.abs().flatten() > 1
    assert changed.tolist() == [False] * 412 + [True] * 100


def test_a_newcomer_leaves_no_residual() -> None:
    memory = StatisticsMemory()
    remember(memory, 1, {0: -1.0, 1: 1.0})
    remember(memory, 2, {2: 5.0, 3: 5.0})
    assert memory.residuals is None


# --- small cohorts and newcomers ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cohort", "received", "expected"),
    [
        # trust 1/4: centre 8 / 4 + 3/4 * 4 = 5
        ({0: 8.0}, f64(4), [3.0]),
        # trust 2/4: centre (8 + 4) / 2 = 6
        ({0: 6.0, 1: 10.0}, f64(4), [0.0, 4.0]),
        # trust 3/4: centre 3/4 * 8 + 1/4 * 4 = 7
        ({0: 6.0, 1: 8.0, 2: 10.0}, f64(4), [-1.0, 1.0, 3.0]),
        # four are trusted: centre 8
        ({0: 6.0, 1: 8.0, 2: 8.0, 3: 10.0}, f64(4), [-2.0, 0.0, 0.0, 2.0]),
        # nothing to lean on: centre 8
        ({0: 6.0, 1: 10.0}, None, [-2.0, 2.0]),
    ],
)
def test_small_cohorts_lean_on_the_received_model(
    cohort: dict[int, float], received: Tensor | None, expected: list[float]
) -> None:
    """The received model's statistic is 4, the cohort's mean 8."""
    memory = StatisticsMemory()
    remember(memory, 1, cohort, received=received)
    assert deviations(memory) == pytest.approx(expected)


def test_a_late_client_joins_on_the_scale_of_the_others() -> None:
    """Known -1, -1, 1, 1 and a newcomer at +1, level 20.

    The four known ones say d - v = 20; the newcomer, whose deviation nobody knows, has no say and
    enters at 21 - 20 = 1.
    """
    memory = StatisticsMemory()
    remember(memory, 1, {0: -1.0, 1: -1.0, 2: 1.0, 3: 1.0})
    remember(memory, 2, {0: 19.0, 1: 19.0, 2: 21.0, 3: 21.0, 9: 21.0})
    assert memory.ids == [0, 1, 2, 3, 9]
    assert deviations(memory) == pytest.approx([-1, -1, 1, 1, 1])


def test_remembering_does_not_depend_on_the_order_of_replies() -> None:
    forward, backward = StatisticsMemory(), StatisticsMemory()
    vectors = {k: torch.randn(6, generator=torch.Generator().manual_seed(k)) for k in range(5)}
    counts = {k: 10 * k + 1 for k in range(5)}
    forward.remember(1, vectors, counts)
    backward.remember(1, dict(reversed(vectors.items())), dict(reversed(counts.items())))
    assert torch.equal(forward.vectors(), backward.vectors())


def test_an_empty_cohort_changes_nothing_and_inputs_are_left_alone() -> None:
    memory, row = StatisticsMemory(), f64(1, 2)
    memory.remember(1, {0: row, 1: f64(3, 4)}, {0: 1, 1: 1})
    memory.remember(2, {}, {})
    assert memory.vectors().tolist() == [[-1, -1], [1, 1]]
    memory.remember(3, {0: row, 1: f64(3, 4)}, {0: 1, 1: 1})
    assert row.tolist() == [1, 2]


# --- smoothed assignments -------------------------------------------------------------------------


def filled(smoothing: float, clients: int = 2) -> StatisticsMemory:
    memory = StatisticsMemory(smoothing)
    remember(memory, 1, {k: float(k) for k in range(clients)})
    return memory


def test_posteriors_after_the_first_are_smoothed_by_the_formula() -> None:
    """3/4 * (1, 0) + 1/4 * (.6, .4) = (.9, .1), and then 3/4 * (.9, .1) + 1/4 * (.6, .4)."""
    memory = filled(0.75)
    first = memory.absorb(posterior([1, 0], [0, 1]))
    assert first.assignments.tolist() == [[1, 0], [0, 1]]
    assert first.elbo == -1.5
    for expected in ([0.9, 0.1], [0.825, 0.175]):
        absorbed = memory.absorb(posterior([0.6, 0.4], [0, 1]))
        torch.testing.assert_close(absorbed.assignments, f64(expected, [0, 1]))
        assert torch.equal(memory.assignments([0, 1]), absorbed.assignments)


def test_without_smoothing_the_newest_posterior_counts_alone_under_the_old_names() -> None:
    memory = filled(0.0)
    memory.absorb(posterior([1, 0], [0, 1]))
    absorbed = memory.absorb(posterior([0.2, 0.8], [0.7, 0.3]))
    assert absorbed.assignments.tolist() == [[0.8, 0.2], [0.3, 0.7]]
    assert absorbed.mixture.tolist() == [0.2, 0.1]


def test_a_late_client_gets_its_own_posterior_while_the_others_are_smoothed() -> None:
    memory = filled(0.5)
    memory.absorb(posterior([1, 0], [0, 1]))
    remember(memory, 2, {7: 3.0})
    absorbed = memory.absorb(posterior([0.8, 0.2], [0, 1], [0.3, 0.7]))
    torch.testing.assert_close(absorbed.assignments, f64([0.9, 0.1], [0, 1], [0.3, 0.7]))
    torch.testing.assert_close(memory.assignments([7, 0]), f64([0.3, 0.7], [0.9, 0.1]))


def test_clients_without_an_assignment_are_key_errors() -> None:
    memory = filled(0.5)
    with pytest.raises(KeyError, match="client 1 has no assignment yet"):
        memory.assignments([1])
    with pytest.raises(KeyError):
        memory.assignments([99])
