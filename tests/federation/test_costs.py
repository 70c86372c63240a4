# SPDX-License-Identifier: Apache-2.0
"""What a round costs, by hand: bytes, steps, extra forward passes and aggregations."""

from __future__ import annotations

import math
from typing import Any

import pytest
from flwr.app import Message

from fedfusion_flwr import protocol
from fedfusion_flwr.data import local_data
from fedfusion_flwr.federation.strategy import FederatedStrategy
from fedfusion_flwr.strategies import (
    IFCA,
    FedAvg,
    FedBN,
    FedCluster,
    FedClusterCycling,
    FedGroup,
    FedProx,
    FeSEM,
)
from fedfusion_flwr.tracking import RunSummary
from fedfusion_flwr.tracking.summary import COSTS
from tests.strategies.planted import QUIET, PlantedClients, run_planted, start_state
from tests.strategies.small import small_config, train_for_real
from tests.support import FakeClient, initial_arrays, replace_metric, run_federation

CLIENTS = 6
# Every model is 24 + 16 float32 in two arrays with a header of 128 bytes each; every training
# takes 5 steps (`PlantedClients`) on 10 examples.
MODEL = (24 + 16) * 4 + 2 * 128
STEPS, EXAMPLES = 5, 10


def built(strategy: type[FederatedStrategy], **settings: Any) -> FederatedStrategy:
    return strategy(**{**QUIET, "fraction_evaluate": 1.0, **settings})


def three(strategy: type[FederatedStrategy], **settings: Any) -> FederatedStrategy:
    if "initial_state" in strategy.__dataclass_fields__:
        settings["initial_state"] = start_state
    return built(strategy, num_clusters=3, **settings)


# Per round: models down, models up, trainings, models tried by each training client.
Round = tuple[int, int, int, int]
PLAIN: Round = (6, 6, 6, 0)
ROWS: dict[str, tuple[FederatedStrategy, list[Round]]] = {
    "fedavg": (built(FedAvg), [PLAIN, PLAIN]),
    "fedavg, a third": (built(FedAvg, fraction_train=1 / 3), [(2, 2, 2, 0)] * 2),
    "fedprox": (built(FedProx), [PLAIN, PLAIN]),
    "fedbn": (built(FedBN), [PLAIN, PLAIN]),
    "fesem: all clients in the warm start": (
        three(FeSEM, fraction_train=0.5),
        [(6 + 3, 6 + 3, 6 + 3, 0), (3, 3, 3, 0)],
    ),
    "fesem without warm start": (three(FeSEM, warm_start=False), [PLAIN, PLAIN]),
    "ifca: three models down": (three(IFCA, warmup_rounds=0), [(18, 6, 6, 3)] * 2),
    "ifca in its warm-up": (three(IFCA, warmup_rounds=1), [PLAIN, (18, 6, 6, 3)]),
    "fedcluster: all clients in the clustering": (
        three(FedCluster, cluster_round=1),
        [PLAIN, (12, 12, 12, 0), PLAIN],
    ),
    "fedcluster-cycling": (built(FedClusterCycling, num_clusters=3), [(2, 2, 2, 0)] * 3),
    "fedgroup: all clients in the cold start": (three(FedGroup), [(12, 12, 12, 0), PLAIN]),
    "fedgroup: newcomers later": (
        three(FedGroup, pretrain_clients=1),  # three clients, then the other three
        [(3 + 3 + 6, 3 + 3 + 6, 3 + 3 + 6, 0), PLAIN],
    ),
}


@pytest.mark.parametrize("row", ROWS)
def test_costs_by_hand(row: str) -> None:
    """Clients also evaluate in every round, which is not counted."""
    strategy, expected = ROWS[row]
    clients = PlantedClients(lambda client: client % 3)
    outcome = run_planted(strategy, clients, CLIENTS, rounds=len(expected))
    summary = RunSummary()
    totals = dict.fromkeys(COSTS, 0.0)
    for report, (down, up, trainings, tried) in zip(outcome.reports[1:], expected, strict=True):
        costs = {
            "bytes-down": down * MODEL,
            "bytes-up": up * MODEL,
            "client-steps": trainings * STEPS,
            "extra-forward-examples": trainings * tried * EXAMPLES,
            "server-aggregations": 1,
        }
        assert {name: report.metrics[name] for name in COSTS} == costs
        totals = {name: totals[name] + costs[name] for name in COSTS}
        summary.on_round_end(report)
    assert summary.summary()["costs"] == totals
    assert any(kind == "evaluate" for kind, *_ in clients.sent)
    exchanges = [row for row in clients.sent if row[0] == "train" and "phase" in row[-1]]
    assert any("exchange" in report.seconds for report in outcome.reports) == bool(exchanges)


def test_a_model_is_as_large_as_its_arrays() -> None:
    record = protocol.record_from_state(start_state())
    assert sum(len(array.data) for array in record.values()) == MODEL


def test_a_bad_reply_costs_its_bytes_and_no_work() -> None:
    """Client 3's reply comes and is refused; client 4 sends an error, which holds no model."""

    def spoil(reply: Message) -> None:
        if reply.content.config_records["client"]["partition-id"] == 4:
            raise OSError("broken")
        reply.content.metric_records["metrics"]["num-examples"] = 0

    outcome = run_federation("fedavg", FakeClient(spoil, hostile=(3, 4)), 5, rounds=1)
    metrics = outcome.reports[1].metrics
    model = sum(len(array.data) for array in initial_arrays().values())
    assert metrics["bytes-down"] == 5 * model
    # The good three and client 3 also sent normalization records: 4 arrays of 2 numbers each.
    assert metrics["bytes-up"] == 4 * (model + 4 * (128 + 2 * 4))
    assert metrics["client-steps"] == 3 * 7


def test_a_round_that_keeps_the_old_model_costs_but_does_not_aggregate() -> None:
    hostile = FakeClient(replace_metric("num-examples", 0), hostile=(0, 1), spoil_rounds=(1,))
    outcome = run_federation("fedavg", hostile, 2, rounds=2)
    kept, good = outcome.reports[1].metrics, outcome.reports[2].metrics
    assert "server-aggregations" not in kept
    assert kept["bytes-down"] == good["bytes-down"] > 0
    assert good["server-aggregations"] == 1


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("source", ["local", "probe"])
def test_our_client_reports_its_steps_and_its_extra_forward_passes(source: str) -> None:
    """IFCA's two models and the probe, each over all training examples; two epochs of batches."""
    config = small_config(
        strategy="ifca",
        num_clusters=2,
        warmup_rounds=1,
        local_epochs=2,
        num_server_rounds=2,
        statistics_source=source,
    )
    sizes = [len(local_data(config, k).x) for k in range(config.num_clients)]
    # A last batch of one example joins the previous one.
    batches = [n // 8 + (n % 8 > 1) for n in sizes]
    reports = train_for_real(config).reports
    probed = sum(sizes) if source == "probe" else 0
    assert [r.metrics["client-steps"] for r in reports[1:]] == [2 * sum(batches)] * 2
    forward = [r.metrics["extra-forward-examples"] for r in reports[1:]]
    assert forward == [probed, 2 * sum(sizes) + probed]


@pytest.mark.usefixtures("small")
def test_cold_start_takes_its_own_number_of_steps() -> None:
    config = small_config(
        strategy="fedgroup", num_clusters=2, pretrain_steps=11, num_server_rounds=1
    )
    sizes = [len(local_data(config, k).x) for k in range(config.num_clients)]
    epoch = sum(n // 8 + (n % 8 > 1) for n in sizes)
    report = train_for_real(config).reports[1]
    assert report.metrics["client-steps"] == 11 * config.num_clients + epoch
    assert math.isfinite(report.metrics["train-loss"])
