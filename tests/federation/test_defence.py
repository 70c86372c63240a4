# SPDX-License-Identifier: Apache-2.0
"""What the robust preset does to well-formed replies, with every strategy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Message

from fedfusion_flwr import protocol
from fedfusion_flwr.config import RunConfig
from fedfusion_flwr.federation.defence import Defence
from fedfusion_flwr.federation.outliers import moments_of, next_bound, outlier_scores
from fedfusion_flwr.federation.replies import ClientReply
from fedfusion_flwr.strategies import build_strategy
from fedfusion_flwr.strategies.fedma import class_weights
from tests.strategies.fedma.matched import other_state, run_fedma
from tests.support import (
    MEAN,
    TINY,
    VARIANCE,
    FakeClient,
    Outcome,
    Spoil,
    assert_identical,
    edit_value,
    honest_state,
    initial_arrays,
    replace_metric,
    run_federation,
    tiny_model,
)

HONEST = 5
STRATEGIES = ("fedfusion", *TINY)
ONE_MODEL: dict[str, dict[str, Any]] = {
    "fesem": {"num_clusters": 1, "warm_start": False},
    "ifca": {"num_clusters": 1},
}
"""With two models there would be fewer than four clients to compare under each."""


def run(name: str, client: FakeClient, count: int = HONEST + 1, **settings: Any) -> Outcome:
    settings = {"defence": Defence(clip_quantile=1.0)} | settings
    return run_federation(name, client, count, **settings)


def far_mean(record: str, key: str) -> Spoil:
    return edit_value(key, lambda array: array + np.float32(50), record)


OUTLIERS: dict[str, Spoil] = {
    "running mean": far_mean("arrays", MEAN),
    "running variance": edit_value(VARIANCE, lambda array: array * np.float32(1e4)),
    "vanishing variance": edit_value(VARIANCE, lambda array: array * np.float32(0)),
    "mean for inference": far_mean("normalization", "mean"),
    "std for inference": edit_value("std", lambda a: a * np.float32(100), "normalization"),
}


@pytest.mark.parametrize("row", OUTLIERS)
@pytest.mark.parametrize("name", STRATEGIES)
def test_outlying_statistics_lose_their_client_and_change_nothing(
    name: str, row: str, caplog: pytest.LogCaptureFixture
) -> None:
    settings = {"rounds": 1, **ONE_MODEL.get(name, {})}
    honest = run(name, FakeClient(), HONEST, **settings)
    with caplog.at_level("WARNING", logger="flwr"):
        outcome = run(name, FakeClient(OUTLIERS[row], hostile=(HONEST,)), **settings)
    report = outcome.reports[1]
    assert {(r.client, r.dropped) for r in report.dropped} == {(HONEST, "outlier")}
    assert report.metrics["dropped-outlier"] == report.metrics["replies-dropped"] >= 1
    detail = report.dropped[0].detail
    assert detail is not None
    assert detail.endswith("outlier-threshold is 20")
    assert_identical(outcome.state, honest.state)
    lines = [line for line in caplog.messages if "outlier-threshold" in line]
    assert len(lines) == report.metrics["dropped-outlier"]
    for line in lines:
        assert line.startswith(f"round 1: reply of client {HONEST} (node ")
        assert "dropped (outlier): its normalization statistics score" in line


def test_among_fewer_than_four_an_outlier_is_kept_with_a_warning(
    caplog: pytest.LogCaptureFixture,
) -> None:
    hostile = FakeClient(OUTLIERS["running mean"], hostile=(2,))
    with caplog.at_level("WARNING", logger="flwr"):
        outcome = run("fedavg", hostile, 3, rounds=1)
    report = outcome.reports[1]
    assert not report.dropped
    assert report.metrics["outliers-kept"] == 1
    assert "kept, because fewer than 4 can be compared" in str(report.clients[2].detail)
    assert sum("client 2 (node" in line for line in caplog.messages) == 1


@pytest.mark.parametrize("name", STRATEGIES)
def test_honest_clients_keep_their_replies(name: str) -> None:
    """The whole preset: nothing is dropped or cut, and some updates are clipped, not all."""
    outcome = run(name, FakeClient(), defence=Defence(), rounds=3)
    for report in outcome.reports[1:]:
        assert report.metrics["replies-dropped"] == 0
        assert "examples-capped" not in report.metrics
        assert "outliers-kept" not in report.metrics
        assert 0 < report.metrics["updates-clipped"] < report.metrics["replies-valid"]


def test_scores_are_measured_and_not_taken_from_the_client() -> None:
    lying = FakeClient(replace_metric("outlier-score", 0.0), hostile=tuple(range(HONEST)))
    outcome = run("fedavg", lying, HONEST, rounds=1)
    received = protocol.state_from_record(initial_arrays())
    moments = [moments_of(honest_state(received, k)) for k in range(HONEST)]
    expected = outlier_scores(moments).max(1).values
    scores = [row.metrics["outlier-score"] for row in outcome.reports[1].clients]
    # The record for inference holds std with an epsilon, which the moments do not.
    assert scores == pytest.approx(expected.tolist(), abs=1e-3)
    assert outcome.reports[1].metrics["outlier-score"] > 0


def scale(factor: float) -> Spoil:
    """Send the update ``factor`` times; the fake client's statistics move with it."""

    def spoil(reply: Message) -> None:
        arrays = reply.content.array_records["arrays"]
        start = protocol.state_from_record(initial_arrays())
        state = protocol.state_from_record(arrays)
        longer = {
            k: start[k] + factor * (v - start[k]) if "running" not in k and v.ndim else v
            for k, v in state.items()
        }
        reply.content["arrays"] = protocol.record_from_state(longer)

    return spoil


def test_long_updates_count_as_much_as_the_median_one(caplog: pytest.LogCaptureFixture) -> None:
    """Client k's update is 0.01 (k + 1) in each of 14 parameters; client 5 sends 100 times that."""
    defence = Defence(outlier_threshold=0, max_examples_ratio=0)
    hostile = FakeClient(scale(100), hostile=(HONEST,))
    with caplog.at_level("INFO", logger="flwr"):
        outcome = run("fedavg", hostile, defence=defence, rounds=1)
    report = outcome.reports[1]
    parameters = sum(p.numel() for p in tiny_model().parameters())
    norms = [0.01 * step * parameters**0.5 for step in (1, 2, 3, 4, 5, 600)]
    bound = 0.035 * parameters**0.5
    assert report.metrics["clip-bound"] == pytest.approx(bound, rel=1e-4)
    assert report.metrics["updates-clipped"] == 3
    assert report.metrics["update-norm"] == pytest.approx(
        sum(n * (k + 1) for k, n in enumerate(norms)) / 21, rel=1e-4
    )
    clipped = {row.client: row.detail for row in report.clients if row.detail}
    assert list(clipped) == [3, 4, 5]
    assert clipped[5] == f"update of norm {norms[5]:.3g} clipped to {bound:.3g}"
    lines = [line for line in caplog.messages if "update of norm" in line]
    assert [line.partition(" (node ")[0] for line in lines] == [
        f"round 1: client {client}" for client in (3, 4, 5)
    ]
    # Examples 10, 20, ..., 60; updates of 1, 2, 3 and three times 3.5 hundredths.
    step = 0.01 * (10 * 1 + 20 * 2 + 30 * 3 + (40 + 50 + 60) * 3.5) / 210
    start = protocol.state_from_record(initial_arrays())
    moved = outcome.state["fc.weight"] - start["fc.weight"]
    torch.testing.assert_close(moved, torch.full_like(moved, step), rtol=1e-4, atol=1e-6)
    bounds = outcome.strategy.progress.clip_bounds
    assert bounds == {"training": pytest.approx(next_bound(bound, norms, 0.5), rel=1e-4)}


def test_the_first_bound_is_the_quantile_itself() -> None:
    """Of norms 1 2 3 4 5 6 in units of the first client's: 0.8 of the way from 1 to 6 is 5."""
    defence = Defence(clip_quantile=0.8, max_examples_ratio=0)
    report = run("fedavg", FakeClient(), defence=defence, rounds=1).reports[1]
    parameters = sum(p.numel() for p in tiny_model().parameters())
    assert report.metrics["clip-bound"] == pytest.approx(0.05 * parameters**0.5, rel=1e-4)
    assert [row.client for row in report.clients if row.detail] == [5]


def test_extra_trainings_have_their_own_bounds() -> None:
    outcome = run("fedgroup", FakeClient(), defence=Defence())
    assert set(outcome.strategy.progress.clip_bounds) == {"cold-start", "training"}


def test_clients_that_do_not_move_are_left_alone() -> None:
    """Updates that are all zero give no bound, and later ones must not be clipped to 0."""
    defence = Defence()
    still = FakeClient(scale(0), hostile=tuple(range(HONEST)), spoil_rounds=(1,))
    outcome = run("fedavg", still, HONEST, defence=defence)
    assert "updates-clipped" not in outcome.reports[1].metrics
    assert outcome.reports[2].metrics["updates-clipped"] == 2


def test_an_inflated_count_is_cut_to_a_multiple_of_the_median() -> None:
    """Examples 10 20 30 40 50 and a million: the median is 35."""
    liar = FakeClient(replace_metric("num-examples", 1_000_000), hostile=(HONEST,))
    outcome = run("fedavg", liar, rounds=1, fraction_evaluate=1.0)
    report = outcome.reports[1]
    row = report.clients[HONEST]
    assert (row.num_examples, row.detail) == (105, "1000000 examples count as 105")
    assert row.weight == pytest.approx(105 / 255)
    # Of the evaluations too, where counts are 1 2 3 4 5 and a million.
    assert report.metrics["examples-capped"] == 2
    expected = sum(0.1 * k * n for k, n in enumerate((1, 2, 3, 4, 5, 10))) / 25
    assert report.metrics["personalized-accuracy"] == pytest.approx(expected)


def test_capped_weights_are_counted_and_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="flwr"):
        outcome = run("fedavg", FakeClient(), rounds=1, max_client_weight=0.2)
    # 10 ... 60 of 210 examples: two of them are more than a fifth.
    assert outcome.reports[1].metrics["weights-capped"] == 2
    assert any("weight 0.286 capped to 0.2" in line for line in caplog.messages)


@pytest.mark.parametrize("name", ["fedavg", "fedfusion", "ifca"])
def test_the_order_of_the_replies_changes_nothing(name: str) -> None:
    one, other = (
        run(name, FakeClient(), defence=Defence(), tamper=tamper)
        for tamper in (None, lambda replies: replies[::-1])
    )
    assert_identical(one.state, other.state)


def test_fedma_is_clipped_and_capped_but_clients_of_different_models_are_not_compared() -> None:
    """Every client starts from its own network, so only round 2 has common layers."""
    far = FakeClient(OUTLIERS["running mean"], hostile=(2,), spoil_rounds=(1,))
    outcome = run_fedma(far, HONEST, initial_state=other_state, defence=Defence())
    for report in outcome.reports[1:]:
        assert report.metrics["replies-dropped"] == 0
        assert "outliers-kept" not in report.metrics
        assert 0 < report.metrics["updates-clipped"] < HONEST
    assert all(value.isfinite().all() for value in outcome.state.values())


def test_a_cut_count_reaches_fedmas_class_weights() -> None:
    """90 examples count as 30: a third of every class."""

    def reply(client: int, count: int, classes: list[float]) -> ClientReply:
        return ClientReply(client, client, count, {}, lists={protocol.CLASS_COUNTS: classes})

    weights = class_weights([reply(0, 30, [60.0, 30.0, 0.0]), reply(1, 10, [10.0, 0.0, 0.0])])
    assert weights.tolist() == [[20.0, 10.0, 1.0], [10.0, 0.0, 1.0]]


def built(**settings: Any) -> Any:
    values = {key.replace("_", "-"): value for key, value in settings.items()}
    return build_strategy(RunConfig.from_run_config(values))


def test_the_preset_and_its_keys() -> None:
    strategy = built(defence="robust", clip_quantile=0.8, outlier_threshold=7.0)
    assert vars(strategy.defence) == {
        "outlier_threshold": 7.0,
        "clip_quantile": 0.8,
        "max_examples_ratio": 3.0,
    }
    assert vars(built(defence="robust").defence) == vars(Defence())
    assert strategy.max_client_weight == 0.2
    assert built(defence="robust", max_client_weight=0.5).max_client_weight == 0.5
    assert built().defence is None
    assert built().max_client_weight == 1.0


@pytest.mark.parametrize("key", ["outlier_threshold", "clip_quantile", "max_examples_ratio"])
def test_its_keys_warn_that_they_are_idle_without_it(
    key: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("WARNING", logger="flwr"):
        built(**{key: 1.0})
    warning = f"run-config key '{key.replace('_', '-')}' has no effect with defence 'none'"
    assert warning in caplog.messages


def test_leaving_out_the_record_does_not_help() -> None:
    """The running statistics, which inference then reads, are still judged."""

    def spoil(reply: Message) -> None:
        OUTLIERS["running mean"](reply)
        del reply.content["normalization"]

    outcome = run("fedfusion", FakeClient(spoil, hostile=(4, 5)), rounds=1)
    assert [row.client for row in outcome.reports[1].dropped] == [4, 5]
