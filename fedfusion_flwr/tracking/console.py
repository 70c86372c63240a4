# SPDX-License-Identifier: Apache-2.0
"""What a run says on the console: a line for each round, and a hint if cores are idle."""

from __future__ import annotations

import math
from collections import Counter
from logging import INFO

from flwr.common.logger import log

from fedfusion_flwr import protocol
from fedfusion_flwr.federation.round import RoundReport

PHASES = ("sample", "exchange", "train", "transfer", "infer", "aggregate", "evaluate")
_FIRST_ROUND = 2
"""In round 1 the actors load data and build models one after the other."""
_IDLE = 0.4


class ConsoleLine:
    """Logs what happened in a round; round 0 is the untrained model.

    Parameters
    ----------
    num_rounds : int
        The total, to show progress.
    """

    def __init__(self, num_rounds: int) -> None:
        self.num_rounds = num_rounds

    def on_round_end(self, report: RoundReport) -> None:
        """Log the line."""
        log(INFO, "%s", self.line(report))

    def line(self, report: RoundReport) -> str:
        """The line itself."""
        m = report.metrics
        parts = [f"round {report.server_round:>{len(str(self.num_rounds))}}/{self.num_rounds}"]
        if "train-loss" in m:
            parts.append(f"train loss {m['train-loss']:.3f}")
        if "global-accuracy" in m:
            loss = f" loss {m['global-loss']:.3f}" if "global-loss" in m else ""
            parts.append(f"test acc {m['global-accuracy']:.4f}{loss}")
        if "personalized-accuracy" in m:
            parts.append(f"personal acc {m['personalized-accuracy']:.4f}")
        if report.fusion is not None:
            largest = sorted(report.fusion.mixture.tolist(), reverse=True)
            shown = " ".join(f"{value:.2f}" for value in largest if value >= 0.005)
            parts.append(f"components {m['components-occupied']:.0f} [{shown}]")
        elif report.clusters:
            sizes = sorted(Counter(report.clusters.values()).values(), reverse=True)
            parts.append(f"clusters {len(sizes)} {sizes}")
        if "adjusted-rand-index" in m:
            parts.append(f"ARI {m['adjusted-rand-index']:.2f}")
        if report.server_round > 0:
            dropped = m.get("replies-dropped", 0)
            # Of all clients that were asked, also in exchanges before the round.
            asked = max(report.num_sampled, m.get("replies-valid", 0) + dropped)
            parts.append(f"dropped {dropped:.0f}/{asked:.0f}")
            if m.get("updates-clipped"):
                parts.append(f"clipped {m['updates-clipped']:.0f}")
            if m.get("round-failed"):
                parts.append("KEPT OLD MODEL")
            if m.get("fusion-fallback"):
                parts.append("INFERENCE FELL BACK")
            seconds = report.seconds
            shown = " ".join(f"{name} {seconds[name]:.1f}" for name in PHASES if name in seconds)
            parts.append(f"{shown} s")
        return " | ".join(parts)


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
