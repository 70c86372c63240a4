# SPDX-License-Identifier: Apache-2.0
"""Client ids are stable although node ids are random."""

from __future__ import annotations

import pytest
from flwr.proto.node_pb2 import NodeInfo

from fedfusion_flwr.errors import FedFusionError
from fedfusion_flwr.federation.in_process_grid import InProcessGrid
from fedfusion_flwr.federation.roster import NotEnoughNodes, Roster
from tests.support import FakeClient, run_federation


def partition_of(grid: InProcessGrid, node: int) -> object:
    return grid.contexts[node].node_config["partition-id"]


@pytest.mark.parametrize("seed", range(5))
def test_ids_follow_registration_not_node_ids(seed: int) -> None:
    grid = InProcessGrid(FakeClient(), 6, seed=seed)
    connected = Roster().connected(grid)
    assert [partition_of(grid, connected[client]) for client in range(6)] == list(range(6))


def test_equal_registration_times_fall_back_to_node_ids() -> None:
    grid = InProcessGrid(FakeClient(), 0)
    for node in (30, 10, 20):
        grid.nodes[node] = NodeInfo(node_id=node, registered_at="2026-01-01T00:00:00")
    assert Roster().connected(grid) == {0: 10, 1: 20, 2: 30}


def test_late_joiner_that_registered_early_changes_nobody() -> None:
    grid = InProcessGrid(FakeClient(), 2)
    roster = Roster()
    before = roster.connected(grid)
    grid.nodes[5] = NodeInfo(node_id=5, registered_at="1999-01-01T00:00:00")
    assert roster.connected(grid) == {**before, 2: 5}


def test_returning_node_keeps_its_id() -> None:
    grid = InProcessGrid(FakeClient(), 3)
    roster = Roster()
    before = roster.connected(grid)
    gone = grid.nodes[before[1]]
    grid.remove_node(before[1])
    assert roster.connected(grid) == {0: before[0], 2: before[2]}
    newcomer = grid.add_node({"partition-id": 3, "num-partitions": 4})
    assert roster.connected(grid) == {0: before[0], 2: before[2], 3: newcomer}
    grid.nodes[gone.node_id] = gone
    assert roster.connected(grid) == {**before, 3: newcomer}


def test_waits_until_all_are_there_before_numbering() -> None:
    grid = InProcessGrid(FakeClient(), 0)
    naps: list[float] = []

    def sleep(seconds: float) -> None:
        # nodes appear one by one, the last to register first
        naps.append(seconds)
        node = 4 - len(naps)
        grid.nodes[node] = NodeInfo(node_id=node, registered_at=f"2026-01-0{node}T00:00:00")

    connected = Roster(sleep).wait_for(grid, 3, timeout=60)
    assert connected == {0: 1, 1: 2, 2: 3}
    assert len(naps) == 3


def test_timeout_says_how_to_get_more() -> None:
    sentence = 'only 2 of 5 expected clients connected within 0 s.*num-supernodes=5".*num-clients'
    with pytest.raises(NotEnoughNodes, match=sentence) as caught:
        Roster(lambda _: None).wait_for(InProcessGrid(FakeClient(), 2), 5, timeout=0)
    assert isinstance(caught.value, FedFusionError)


def test_goes_on_with_fewer_after_the_timeout_only() -> None:
    grid = InProcessGrid(FakeClient(), 2)
    roster = Roster(lambda _: pytest.fail("waited although the time was over"))
    assert list(roster.wait_for(grid, 5, timeout=0, at_least=2)) == [0, 1]
    with pytest.raises(NotEnoughNodes, match="only 2 of 5"):
        Roster(lambda _: None).wait_for(grid, 5, timeout=0, at_least=3)


def test_waits_for_all_although_fewer_would_do() -> None:
    grid = InProcessGrid(FakeClient(), 2)
    late = {"partition-id": 2, "num-partitions": 3}
    connected = Roster(lambda _: grid.add_node(late)).wait_for(grid, 3, timeout=60, at_least=2)
    assert list(connected) == [0, 1, 2]


def test_run_with_too_few_nodes_does_not_start() -> None:
    client = FakeClient()
    with pytest.raises(NotEnoughNodes, match="only 2 of 4"):
        run_federation("fedavg", client, 2, min_available_nodes=4, node_timeout=0)
    assert not client.seen
