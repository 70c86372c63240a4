# SPDX-License-Identifier: Apache-2.0
"""A strategy that has nothing to do is FedAvg, bit for bit, in every round.

Real training through the package's own client. FedFusion's cases are in ``test_fedfusion.py`` (one
component, bit for bit; counts and identical clients, to rounding).
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from flwr.serverapp.strategy import FedAvg as FlowerFedAvg

from client_app import app
from fedfusion_flwr import protocol
from fedfusion_flwr.federation.in_process_grid import InProcessGrid
from fedfusion_flwr.strategies import FedAvg, FedGroup
from tests.strategies.small import initial_model, small_config, train_for_real
from tests.support import Outcome, State, assert_identical

pytestmark = pytest.mark.usefixtures("small")

HALF = {"fraction_train": 0.5}
NO_NORMALIZATION = {"model": "resnet18"}
AFTER_ONE = {"cluster_round": 1}
ONE_CENTRE = {"num_clusters": 1, "centre_update": "round", "warm_start": False}

# strategy, settings that leave it nothing to do, settings of both sides
FEDAVG: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "FedAvgM, momentum 0, rate 1": ("fedavgm", {"server_momentum": 0.0}, HALF),
    "FedProx, mu 0": ("fedprox", {"proximal_mu": 0.0}, HALF),
    "FedProx, one full-batch step, small mu": ("fedprox", {"proximal_mu": 0.1}, {"batch_size": 99}),
    "FedProx, one full-batch step, large mu": ("fedprox", {"proximal_mu": 9.0}, {"batch_size": 99}),
    "Fed-GN without a norm layer": ("fed-gn", {}, NO_NORMALIZATION | HALF),
    "FedBN without a norm layer": ("fedbn", {}, NO_NORMALIZATION | HALF),
    "FeSEM, one centre of the round's clients": ("fesem", ONE_CENTRE, HALF),
    "FeSEM, one centre of all": ("fesem", ONE_CENTRE | {"centre_update": "all"}, {}),
    "IFCA, one model": ("ifca", {"num_clusters": 1}, HALF),
    "IFCA, one model, no warm-up": ("ifca", {"num_clusters": 1, "warmup_rounds": 0}, HALF),
    "FedCluster before n0": ("fedcluster", {"cluster_round": 3}, HALF),
    "FedCluster, one cluster after n0": ("fedcluster", AFTER_ONE | {"num_clusters": 1}, HALF),
    "FedCluster, no limit": ("fedcluster", AFTER_ONE | {"distance_threshold": 1e12}, HALF),
    "FedCluster by cycling, one cluster": ("fedcluster-cycling", {"num_clusters": 1}, HALF),
}


def differs(state: State, other: State) -> bool:
    return any(not torch.equal(value, other[key]) for key, value in state.items())


def assert_same_rounds(one: Outcome, other: Outcome) -> None:
    assert len(one.reports) == len(other.reports) == 4
    for report, expected in zip(one.reports, other.reports, strict=True):
        assert_identical(report.model, expected.model)
        assert [r.client for r in report.clients] == [r.client for r in expected.clients]
    assert differs(one.state, one.reports[0].model), "nothing was trained"


@pytest.mark.parametrize("row", FEDAVG)
def test_equals_fedavg_bit_for_bit(row: str) -> None:
    name, idle, both = FEDAVG[row]
    degenerate = train_for_real(small_config(strategy=name, **{**idle, **both}))
    assert_same_rounds(degenerate, train_for_real(small_config(strategy="fedavg", **both)))


def test_fedgroup_with_one_group_is_fedavg_from_the_mean_of_the_pretrained() -> None:
    """eta_G = 0; the cohort is all clients, and there are no newcomers after the cold start."""
    grouped = train_for_real(small_config(strategy="fedgroup", num_clusters=1, pretrain_steps=3))

    class ColdStart(FedGroup):
        def prepare_cohort(self, cohort: Any, exchange: Any) -> None:
            self.start = self.clusters.models[0]
            raise StopIteration

    cold = ColdStart(num_clusters=1, pretrain_steps=3, min_available_nodes=6)
    with pytest.raises(StopIteration):
        train_for_real(small_config(), strategy=cold)
    averaged = train_for_real(small_config(strategy="fedavg"), start=cold.start)
    for report, expected in zip(grouped.reports[1:], averaged.reports[1:], strict=True):
        assert_identical(report.model, expected.model)
    assert differs(cold.start, initial_model(small_config()))


def test_the_table_can_fail() -> None:
    """Negative control: with something to do, none of the strategies is FedAvg."""
    base = train_for_real(small_config(strategy="fedavg")).state
    for name in ("fedprox", "fedbn", "fesem", "ifca", "fedcluster", "fedcluster-cycling"):
        busy = {"proximal_mu": 1.0, "num_clusters": 2, "cluster_round": 1, "warmup_rounds": 1}
        state = train_for_real(small_config(strategy=name, **busy)).state
        assert differs(state, base), name


def test_our_fedavg_is_flowers_to_rounding() -> None:
    """The reference of the table equals Flower's FedAvg, apart from moments."""
    config = small_config(strategy="fedavg", num_server_rounds=2, **NO_NORMALIZATION)
    ours = train_for_real(config, strategy=FedAvg(fraction_evaluate=0.0)).state
    grid = InProcessGrid(app, config.num_clients, config.to_run_config())

    start = protocol.record_from_state(initial_model(config))
    theirs = FlowerFedAvg(fraction_evaluate=0.0).start(grid, start, 2)
    for key, value in protocol.state_from_record(theirs.arrays).items():
        torch.testing.assert_close(ours[key], value, rtol=1e-6, atol=1e-7)
