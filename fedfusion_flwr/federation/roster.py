# SPDX-License-Identifier: Apache-2.0
"""Stable client ids for Flower's random node ids."""

from __future__ import annotations

import time
from collections.abc import Callable
from logging import INFO

from flwr.common.logger import log
from flwr.serverapp import Grid

from fedfusion_flwr.errors import FedFusionError


class NotEnoughNodes(FedFusionError, RuntimeError):
    """Fewer nodes connected than the run expects, and waiting did not help."""


class Roster:
    """Numbers nodes 0, 1, 2, ... in the order in which they registered.

    Node ids are random in every run, so nothing that must be repeatable may depend on them. In
    Flower's simulation the order of registration is the order of partitions. A node that leaves and
    returns keeps its number; one that joins late gets the next.
    """

    def __init__(self, sleep: Callable[[float], None] = time.sleep) -> None:
        self._client_of: dict[int, int] = {}
        self._restored = False
        self._sleep = sleep

    def capture(self) -> dict[int, int]:
        """Client id by node id; `restore` inverts it."""
        return self._client_of

    def restore(self, client_of: dict[int, int]) -> None:
        """Restore the ids: devices keep their node ids; the nodes of a simulation are all new."""
        self._client_of, self._restored = client_of, True

    def connected(self, grid: Grid) -> dict[int, int]:
        """Node id by client id for the nodes that are connected now."""
        nodes = sorted(grid.get_nodes(), key=lambda node: (node.registered_at, node.node_id))
        if self._restored and not any(node.node_id in self._client_of for node in nodes):
            self._client_of = {}
        self._restored = False
        for node in nodes:
            self._client_of.setdefault(node.node_id, len(self._client_of))
        return {self._client_of[node.node_id]: node.node_id for node in nodes}

    def wait_for(
        self, grid: Grid, expected: int, timeout: float, at_least: int | None = None
    ) -> dict[int, int]:
        """Wait until ``expected`` nodes are connected, at most ``timeout`` seconds.

        Numbers are assigned only then, so that a slow start does not change them.

        Parameters
        ----------
        grid : Grid
            Whose nodes to count.
        expected : int
            Number of nodes to wait for.
        timeout : float
            Seconds, after which ``at_least`` nodes suffice.
        at_least : int or None
            ``expected`` by default.

        Raises
        ------
        NotEnoughNodes
            Names the number found and how to get more.
        """
        at_least = expected if at_least is None else at_least
        deadline = time.monotonic() + timeout
        announced = False
        while (found := len(list(grid.get_node_ids()))) < expected:
            if time.monotonic() >= deadline:
                if found >= at_least:
                    log(INFO, "Continuing with %d of %d clients", found, expected)
                    break
                raise NotEnoughNodes(
                    f"only {found} of {expected} expected clients connected within {timeout:g} s; "
                    f"in simulation start the run with --federation-config "
                    f'"num-supernodes={expected}", on devices start more SuperNodes, or lower '
                    "min-available-clients or num-clients"
                )
            if not announced:
                log(INFO, "Waiting for %d clients (%d connected)", expected, found)
                announced = True
            self._sleep(0.1)
        return self.connected(grid)
