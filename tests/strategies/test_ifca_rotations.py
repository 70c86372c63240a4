# SPDX-License-Identifier: Apache-2.0
"""IFCA on its authors' own task: clients whose digits are turned by different angles."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from sklearn.metrics import adjusted_rand_score

from fedfusion_flwr import RunConfig
from fedfusion_flwr.data import partition_for
from tests.strategies.small import train_for_real

pytestmark = [pytest.mark.rounding, pytest.mark.slow]


def clusters_by_round(rotations: int, clients: int, warmup_rounds: int, seed: int) -> Any:
    """The planted rotations, and the clusters after every round."""
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
            "seed": seed,
        }
    )
    truth = partition_for(config).main_components
    assert truth is not None
    return truth, [report.clusters for report in train_for_real(config).reports]


@pytest.mark.parametrize(
    ("rotations", "clients", "warmup_rounds", "seeds", "least"), [(2, 8, 2, 6, 3), (4, 12, 3, 3, 1)]
)
def test_planted_rotations_are_recovered_and_stay(
    rotations: int, clients: int, warmup_rounds: int, seeds: int, least: int
) -> None:
    """The warm-up's division ignores them; by the second free choice they are found, or never.

    Whether they are depends on the initial models: measured, in 4 of 6 and in 2 of 3 seeds.
    """
    recovered = 0
    for seed in range(seeds):
        truth, found = clusters_by_round(rotations, clients, warmup_rounds, seed)

        def agreement(clusters: dict[int, int], truth: np.ndarray = truth) -> float:
            assert clusters.keys() == set(range(clients))
            pairs = [(truth[client], cluster) for client, cluster in clusters.items()]
            return float(adjusted_rand_score(*zip(*pairs, strict=True)))

        assert agreement(found[warmup_rounds]) < 0.5
        # A slower start than the first free choice is allowed; later no client changes its mind.
        settled = found[warmup_rounds + 2 : warmup_rounds + 5]
        assert settled[0] == settled[-1]
        recovered += [agreement(clusters) for clusters in settled] == [1.0, 1.0, 1.0]
    assert recovered >= least
