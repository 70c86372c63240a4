# SPDX-License-Identifier: Apache-2.0
"""Scores of inferred against planted components."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedfusion_flwr.federation.round import ClientRow, FusionSnapshot, RoundReport
from fedfusion_flwr.fusion import FusionPosterior
from fedfusion_flwr.tracking import ComponentRecovery
from fedfusion_flwr.tracking.recovery import assignment_error, renumbered

ARI = "adjusted-rand-index"
NMI = "normalized-mutual-information"
OCCUPIED = "occupied-groups"
ERROR = "assignment-error"


def report(
    components: list[int], *, known: dict[int, int] | None = None, server_round: int = 1
) -> RoundReport:
    """Clients 0, 1, ... in the given components; ``known`` are the partitions they name."""
    count = len(components)
    known = {c: c for c in range(count)} if known is None else known
    return RoundReport(
        server_round,
        clients=[ClientRow(c, 100 + c, partition=p) for c, p in known.items()],
        clusters=dict(enumerate(components)),
    )


def one_hot(planted: list[int]) -> np.ndarray:
    return np.asarray(np.eye(max(planted) + 1)[planted])


def inference(assignments: list[list[float]], clients: list[int]) -> FusionSnapshot:
    b = torch.tensor(assignments, dtype=torch.float64)
    posterior = FusionPosterior(b, b.mean(0), torch.zeros(b.shape[1], 1), elbo=0.0)
    return FusionSnapshot(clients, posterior, b.mean(0), torch.zeros(len(b)))


def scored(planted: list[int], found: RoundReport) -> RoundReport:
    ComponentRecovery(one_hot(planted)).on_round_end(found)
    return found


SPLIT_NMI = 2 * math.log(2) / (1.5 * math.log(2) + math.log(3) / 3 + math.log(6) / 6)
"""Knowing the found group tells the half (ln 2 nats); found shares 1/2, 1/3, 1/6: ln 2 over the
mean of ln 2 and ln 2 / 2 + ln 3 / 3 + ln 6 / 6."""


@pytest.mark.parametrize(
    ("planted", "found", "ari", "nmi"),
    [
        ([0, 0, 1, 1], [3, 3, 2, 2], 1.0, 1.0),  # names do not matter
        ([0, 0, 1, 1], [0, 0, 0, 0], 0.0, 0.0),
        # Pairs together in both 0, in planted 2, in found 2, of 6:
        # (0 - 2/3) / (2 - 2/3) = -1/2
        ([0, 0, 1, 1], [0, 1, 0, 1], -0.5, 0.0),
        # One group split: together in both 4, planted 6, found 4, of 15:
        # (4 - 24/15) / (5 - 24/15) = 12/17
        ([0, 0, 0, 1, 1, 1], [0, 0, 0, 1, 2, 1], 12 / 17, SPLIT_NMI),
    ],
)
def test_by_hand(planted: list[int], found: list[int], ari: float, nmi: float) -> None:
    metrics = scored(planted, report(found)).metrics
    assert (metrics[ARI], metrics[NMI]) == pytest.approx((ari, nmi))


def test_clients_are_matched_by_partition_not_by_id() -> None:
    outcome = scored([0, 1, 0, 1], report([0, 0, 1, 1], known={0: 0, 1: 2, 2: 1, 3: 3}))
    assert outcome.metrics[ARI] == 1.0
    assert outcome.planted == {0: 0, 1: 0, 2: 1, 3: 1}


def test_partitions_of_earlier_rounds_are_remembered() -> None:
    recovery = ComponentRecovery(one_hot([0, 0, 1, 1]))
    recovery.on_round_end(report([0, 0, 1, 1], known={0: 0, 2: 2}))
    later = report([0, 0, 1, 1], known={1: 1, 3: 3}, server_round=2)
    recovery.on_round_end(later)
    assert later.metrics[ARI] == 1.0


def test_clients_that_do_not_name_their_partition_are_left_out() -> None:
    found = report([0, 1, 1, 1], known={0: 0, 2: 2, 3: 3})  # the misplaced client 1 is unknown
    assert scored([0, 0, 1, 1], found).metrics[ARI] == 1.0


@pytest.mark.parametrize(
    "found", [report([0, 1], known={}), report([0, 1], known={0: 0}), RoundReport(0)]
)
def test_no_score_for_fewer_than_two(found: RoundReport) -> None:
    assert scored([0, 1], found).metrics == {}


@pytest.mark.parametrize(
    ("planted", "found", "occupied"),
    [
        ([0, 0, 1, 1, 2, 2], [5, 5, 3, 3, 4, 4], 3),
        # Groups 1 and 2 share a cluster: half of it is no majority.
        ([0, 0, 1, 1, 2, 2], [0, 0, 1, 1, 1, 1], 1),
        # One client of group 2 went astray: group 1 has two thirds of cluster 1.
        ([0, 0, 1, 1, 2, 2], [0, 0, 1, 1, 1, 2], 3),
        ([0, 0, 0, 1, 1, 2], [0, 0, 0, 0, 0, 0], 0),  # half of one cluster for all
        ([0, 0, 0, 0, 1, 2], [0, 0, 0, 0, 0, 0], 1),
        ([0, 0, 0, 0, 1, 1], [0, 0, 1, 1, 2, 2], 2),  # a split group counts once
    ],
)
def test_occupied_groups_by_hand(planted: list[int], found: list[int], occupied: int) -> None:
    assert scored(planted, report(found)).metrics[OCCUPIED] == occupied


@pytest.mark.parametrize(
    ("planted", "inferred", "error"),
    [
        # The same under other names.
        ([[0.7, 0.3], [0.2, 0.8]], [[0.3, 0.7], [0.8, 0.2]], 0.0),
        # Client 0 is .1 off in two components, client 1 .3: (.1 + .3) / 2.
        ([[0.7, 0.3], [0.2, 0.8]], [[0.6, 0.4], [0.5, 0.5]], 0.2),
        # Component 2 is spare: its .4 of client 1 lack in planted component 1: (0 + .4) / 2.
        ([[1.0, 0.0], [0.0, 1.0]], [[0.0, 1.0, 0.0], [0.6, 0.0, 0.4]], 0.2),
        # One component for three groups: one client of three is right.
        ([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]], [[1.0]] * 3, 2 / 3),
        # Saying nothing: each client has .5 where it should not.
        ([[1.0, 0.0], [0.0, 1.0]], [[0.5, 0.5]] * 2, 0.5),
    ],
)
def test_assignment_error_by_hand(
    planted: list[list[float]], inferred: list[list[float]], error: float
) -> None:
    assert assignment_error(np.array(planted), np.array(inferred)) == pytest.approx(error)


@given(st.integers(1, 8), st.integers(1, 4), st.integers(0, 3), st.integers(0, 99))
def test_any_renumbering_with_spare_components_has_no_error(
    clients: int, count: int, spare: int, seed: int
) -> None:
    generator = np.random.default_rng(seed)
    planted = generator.dirichlet(np.ones(count), clients)
    names = generator.permutation(count + spare)
    inferred = np.pad(planted, ((0, 0), (0, spare)))[:, names]
    assert assignment_error(planted, inferred) == 0
    wide, matched, order = renumbered(planted, inferred)
    np.testing.assert_array_equal(matched, wide)
    np.testing.assert_array_equal(inferred[:, order], wide)


def test_assignments_are_scored_for_known_clients_by_their_partition() -> None:
    mixtures = np.array([[0.9, 0.1], [0.2, 0.8], [0.5, 0.5]])
    # Client 4 holds partition 1, client 7 partition 0; client 5 told nothing.
    found = RoundReport(1, clients=[ClientRow(4, 0, partition=1), ClientRow(7, 1, partition=0)])
    found.fusion = inference([[0.3, 0.7], [0.0, 1.0], [1.0, 0.0]], [4, 5, 7])
    ComponentRecovery(mixtures).on_round_end(found)
    # Client 4 is .1 off, client 7 too.
    assert found.metrics == {ERROR: pytest.approx(0.1)}
    assert {client: row.tolist() for client, row in found.planted_mixtures.items()} == {
        4: [0.2, 0.8],
        7: [0.9, 0.1],
    }
    assert found.planted == {4: 1, 7: 0}


def test_no_assignment_error_without_an_inference_or_for_one_client() -> None:
    assert ERROR not in scored([0, 1], report([0, 1])).metrics
    found = report([0, 1], known={1: 1})
    found.fusion = inference([[1.0, 0.0], [0.0, 1.0]], [0, 1])
    assert ERROR not in scored([0, 1], found).metrics
