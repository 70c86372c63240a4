# SPDX-License-Identifier: Apache-2.0
"""IFCA on its authors' own task: clients whose digits are turned by different angles."""

from __future__ import annotations

import pytest
from sklearn.metrics import adjusted_rand_score

from fedfusion_flwr import RunConfig
from fedfusion_flwr.data import partition_for
from tests.strategies.small import train_for_real

pytestmark = [pytest.mark.rounding, pytest.mark.slow]


@pytest.mark.parametrize(
    ("rotations", "clients", "warmup_rounds"),
    [(2, 8, 2), (4, 12, 3)],
)
def test_planted_rotations_are_recovered_and_stay(
    rotations: int, clients: int, warmup_rounds: int
) -> None:
    """The warm-up's division ignores them; by the second free choice they are found."""
    config = RunConfig.from_run_config(
        {
            "strategy": "ifca",
            "partition": "components",
            "component-transform": "rotate",
            "planted-components": rotations,
            "num-clusters": rotations,
            "num-clients": clients,
            "warmup-rounds": warmup_rounds,
            "num-server-rounds": warmup_rounds + 4,
            "batch-size": 64,
            "fraction-evaluate": 0.0,
        }
    )
    truth = partition_for(config).main_components
    assert truth is not None
    found = [report.clusters for report in train_for_real(config).reports]

    def agreement(server_round: int) -> float:
        clusters = found[server_round]
        assert clusters.keys() == set(range(clients))
        pairs = [(truth[client], cluster) for client, cluster in clusters.items()]
        return float(adjusted_rand_score(*zip(*pairs, strict=True)))

    assert agreement(warmup_rounds) < 0.5
    # A slower start than the first free choice is allowed; later no client changes its mind.
    settled = range(warmup_rounds + 2, warmup_rounds + 5)
    assert [agreement(server_round) for server_round in settled] == [1.0, 1.0, 1.0]
    assert found[warmup_rounds + 2] == found[warmup_rounds + 4]
