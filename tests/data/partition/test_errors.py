# SPDX-License-Identifier: Apache-2.0
"""Requests for partitions that cannot be met."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from fedfusion_flwr.data.partition import PartitionError, make_partition
from tests.data.partition.small import LABELS, made, spec_of


@pytest.mark.parametrize(
    ("kind", "fields", "message"),
    [
        ("random", {}, "`partition` is 'random'; it must be one of iid, dirichlet"),
        ("iid", {"num_clients": 0}, "`num-clients` is 0; it must be at least 1"),
        ("iid", {"num_clients": 401}, "`num-clients` is 401; it must be at most 400"),
        ("iid", {"seed": -1}, "`seed` is -1"),
        ("dirichlet", {"dirichlet_alpha": 0.0}, "`dirichlet-alpha` is 0.0; it must be from 0.001"),
        ("dirichlet", {"dirichlet_alpha": float("inf")}, "`dirichlet-alpha` is inf"),
        ("dirichlet", {"dirichlet_alpha": float("nan")}, "`dirichlet-alpha` is nan"),
        ("dirichlet", {"min_partition_size": 0}, "`min-partition-size` is 0"),
        (
            "dirichlet",
            {"min_partition_size": 41},
            "`min-partition-size` is 41; it must be at most 40 with `num-clients` 10",
        ),
        (
            "dirichlet",
            {"min_partition_size": 40, "dirichlet_alpha": 0.1},
            "`dirichlet-alpha` 0.1 and `num-clients` 10 .* `min-partition-size` 40",
        ),
        ("pathological", {"classes_per_client": 11}, "`classes-per-client` is 11; .* at most 10"),
        ("pathological", {"classes_per_client": 0}, "`classes-per-client` is 0"),
        (
            "pathological",
            {"num_clients": 300, "classes_per_client": 5},
            "`classes-per-client` 5 and `num-clients` 300",
        ),
        ("shards", {"shards_per_client": 41}, "`shards-per-client` is 41; .* at most 40"),
        ("shards", {"shards_per_client": 0}, "`shards-per-client` is 0"),
        ("components", {"planted_components": 0}, "`planted-components` is 0"),
        (
            "components",
            {"planted_components": 11, "num_clients": 20},
            "`planted-components` is 11; it must be at most 10, .* `component-transform`",
        ),
        ("components", {"num_clients": 4}, "`planted-components` is 5; it must be at most 4"),
        (
            "components",
            {"num_clients": 400, "component_sizes": "long-tailed"},
            "`num-clients` 400 .* lower `num-clients`",
        ),
        ("components", {"component_mixing": -0.1}, "`component-mixing` is -0.1; it must be 0 or"),
        ("components", {"component_sizes": "equal"}, "`component-sizes` is 'equal'"),
        ("components", {"component_transform": "flip"}, "`component-transform` is 'flip'"),
    ],
)
def test_infeasible_requests_name_the_key(kind: str, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(PartitionError, match=message):
        made(kind, **fields)


@pytest.mark.parametrize("labels", [[], [0, 10], [-1, 3]])
def test_wrong_labels_are_refused(labels: list[int]) -> None:
    with pytest.raises(PartitionError, match="labels from 0 to 9"):
        make_partition(np.array(labels, dtype=np.int64), 10, spec_of("iid", 1))


def test_a_missing_class_cannot_be_planted() -> None:
    with pytest.raises(PartitionError, match="too few examples of some class"):
        make_partition(LABELS[40:], 10, spec_of("components"))


def test_keys_of_other_kinds_do_not_matter() -> None:
    assert len(made("iid", 3, classes_per_client=99, planted_components=99).indices) == 3
