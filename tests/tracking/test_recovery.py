# SPDX-License-Identifier: Apache-2.0
"""Scores of inferred against planted components."""

from __future__ import annotations

import math

import numpy as np
import pytest

from fedfusion_flwr.federation.round import ClientRow, RoundReport
from fedfusion_flwr.tracking import ComponentRecovery

ARI = "adjusted-rand-index"
NMI = "normalized-mutual-information"


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


def scored(planted: list[int], found: RoundReport) -> RoundReport:
    ComponentRecovery(np.array(planted)).on_round_end(found)
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
    recovery = ComponentRecovery(np.array([0, 0, 1, 1]))
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
