# SPDX-License-Identifier: Apache-2.0
"""A hint for simulations that leave cores idle."""

from __future__ import annotations

import math
from logging import INFO

from flwr.common.logger import log

from fedfusion_flwr import protocol
from fedfusion_flwr.federation.round import RoundReport

_FIRST_ROUND = 2
"""In round 1 the actors load data and build models one after the other."""
_IDLE = 0.4


class IdleCores:
    """Logs once how to train more clients at a time, if cores are idle.

    Flower gives every client two CPUs by default; on two cores, clients then train one after the
    other, each with its few threads.

    Parameters
    ----------
    cores : int
        Cores that the clients can use, at least 1.
    threads_per_client : int
        Threads that each client uses.
    """

    def __init__(self, cores: int, threads_per_client: int) -> None:
        self.cores = cores
        self.threads_per_client = threads_per_client
        self._done = False

    def on_round_end(self, report: RoundReport) -> None:
        """Check the first typical round."""
        if self._done or report.server_round < _FIRST_ROUND:
            return
        self._done = True
        advice = self.advice(report)
        if advice:
            log(INFO, "%s", advice)

    def advice(self, report: RoundReport) -> str | None:
        """What to do, if more than 40 % of the cores' time was idle."""
        work = [row.metrics.get(protocol.TRAIN_SECONDS, 0.0) for row in report.clients]
        waited = report.seconds.get("train", 0.0) + report.seconds.get("transfer", 0.0)
        if waited <= 0:
            return None
        busy = self.threads_per_client * sum(work) / waited
        room = min(self.cores, self.threads_per_client * len(work))
        if busy > (1 - _IDLE) * room:
            return None
        return (
            f"hint: clients kept {busy:.1f} of {self.cores} cores busy; "
            f'--federation-config "client-resources-num-cpus={self.threads_per_client}" trains '
            f"{math.floor(self.cores / self.threads_per_client)} at a time, which is faster where "
            "clients have enough to do"
        )
