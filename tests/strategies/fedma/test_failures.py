# SPDX-License-Identifier: Apache-2.0
"""Clients that lie, fail or vanish during FedMA's passes."""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Context, Message

from fedfusion_flwr.federation.conversation import RunStopped
from tests.federation.hostile_rows import SPOILED
from tests.strategies.fedma.matched import HONEST, OUT, run_fedma
from tests.strategies.planted import Listener
from tests.support import (
    WEIGHT,
    FakeClient,
    Outcome,
    TamperingGrid,
    assert_identical,
    edit_value,
    replace_metric,
    tiny_model,
)


@functools.cache
def honest_run() -> Outcome:
    return run_fedma(FakeClient(), HONEST)


@pytest.mark.parametrize("row", SPOILED)
def test_hostile_client_is_left_out_of_the_pass(row: str) -> None:
    spoil, reason = SPOILED[row]
    outcome = run_fedma(FakeClient(spoil, hostile=(HONEST,)), HONEST + 1)
    first, second = outcome.train_metrics(1), outcome.train_metrics(2)
    assert first[f"dropped-{reason}"] == first["replies-dropped"] == 1
    assert second["replies-dropped"] == 0
    assert first["replies-valid"] == second["replies-valid"] == HONEST
    assert_identical(outcome.state, honest_run().state)


@pytest.mark.parametrize(
    "counts",
    [None, [60], [30, 20, 10], [70, -10], [60, 1], [59.5, 0.5], 60, [60.0, math.nan]],
    ids=str,
)
def test_false_class_counts_cost_the_reply(counts: Any) -> None:
    """Missing, too few, too many, negative, of another sum, halves, one number, not a number."""

    def spoil(reply: Message) -> None:
        if counts is None:
            del reply.content.metric_records["metrics"]["class-counts"]
        else:
            replace_metric("class-counts", counts)(reply)

    client = FakeClient(spoil, hostile=(HONEST,), spoil_rounds=(2,))
    outcome = run_fedma(client, HONEST + 1)
    reason = "nonfinite" if "nan" in str(counts) else "class-counts"
    assert outcome.train_metrics(2)[f"dropped-{reason}"] == 1
    (dropped,) = outcome.reports[2].dropped
    if reason == "class-counts":
        assert dropped.detail is not None
        assert "2 whole numbers that sum to num-examples = 60" in dropped.detail
    # Layer 1 has all six clients' mean, layer 2 is that of five.
    assert not torch.equal(outcome.state[WEIGHT], honest_run().state[WEIGHT])
    assert [row.client for row in outcome.reports[2].clients if row.weight] == list(range(HONEST))


def test_a_class_that_nobody_has_is_the_plain_mean() -> None:
    def one_class(reply: Message) -> None:
        metrics = reply.content.metric_records["metrics"]
        if "class-counts" in metrics:
            metrics["class-counts"] = [metrics["num-examples"], 0]  # type: ignore[assignment]

    client = FakeClient(one_class, hostile=(0, 1, 2))
    outcome = run_fedma(client, 3, matching_width="fixed")
    start = tiny_model().state_dict()
    moved = torch.tensor([2 * (1 + 4 + 9) / 600, 0.04])  # sum n d / sum n, and mean d; d twice
    torch.testing.assert_close(outcome.state[OUT], start[OUT] + moved[:, None])


def test_clients_cannot_change_matched_layers() -> None:
    """Replies of the second round with other lower layers make no difference."""
    spoil = edit_value(WEIGHT, lambda array: -array)
    client = FakeClient(spoil, hostile=tuple(range(HONEST)), spoil_rounds=(2,))
    assert_identical(run_fedma(client, HONEST).state, honest_run().state)


def drop_all(reply: Message) -> None:
    del reply.content["arrays"]


def test_a_round_that_fails_is_repeated() -> None:
    everybody = tuple(range(HONEST))
    client = FakeClient(drop_all, hostile=everybody, spoil_rounds=(2,))
    outcome = run_fedma(client, HONEST, rounds=3)
    assert outcome.train_metrics(2)["round-failed"] == 1
    assert [outcome.train_metrics(r)["layer"] for r in (1, 3)] == [1, 2]
    assert_identical(outcome.state, honest_run().state)


def test_replies_that_would_overflow_keep_the_old_model() -> None:
    huge = edit_value(OUT, lambda array: np.full_like(array, 3e38))
    client = FakeClient(huge, hostile=(0, 1), spoil_rounds=(2,))
    outcome = run_fedma(client, 2, rounds=3, max_update_ratio=math.inf)
    assert outcome.state[OUT].isfinite().all()


@pytest.mark.parametrize(("lost", "min_valid"), [((0,), 1), ((0, 1, 2), 1), ((0,), 3)])
def test_clients_that_vanish_on_the_way(lost: tuple[int, ...], min_valid: int) -> None:
    """The pass goes on without them; with too few left, a new one begins with the others."""

    class Vanishing(Listener):
        def __call__(self, message: Message, context: Context) -> Message:
            reply = super().__call__(message, context)
            if len(self.sent) == 3 and grid.nodes.keys() == set(nodes):
                for partition in lost:
                    grid.remove_node(nodes[partition])
                for partition in range(3, 6):
                    grid.add_node({"partition-id": partition, "num-partitions": 6})
            return reply

    client = Vanishing()
    grid = TamperingGrid(client, 3)
    nodes = list(grid.nodes)
    settings = {"min_valid_replies": min_valid, "matching_width": "fixed"}
    outcome = run_fedma(client, 3, rounds=3, grid=grid, **settings)
    asked = [client.states_for("train", number).keys() for number in (1, 2)]
    assert asked[0] == {0, 1, 2}
    if len(lost) == 1 and min_valid == 1:
        assert asked[1] == {1, 2}
        assert outcome.train_metrics(2)["layer"] == 2
        assert [row.weight for row in outcome.reports[2].clients] == [0.5, 0.5]
    else:
        assert asked[1] == set(range(6)) - set(lost)
        assert outcome.train_metrics(2)["layer"] == 1
        assert outcome.train_metrics(3)["layer"] == 2


def test_passes_that_never_succeed_end_the_run() -> None:
    client = FakeClient(drop_all, hostile=(0, 1), spoil_rounds=(2, 3, 4))
    with pytest.raises(RunStopped, match="3 failed rounds in a row"):
        run_fedma(client, 2, rounds=6)
