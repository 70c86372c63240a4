# SPDX-License-Identifier: Apache-2.0
"""How long the rest of a comparison will take, and what slows it down."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from typing import NamedTuple

import torch

from fedfusion_flwr.computation import choose_device, slow_precision
from fedfusion_flwr.experiments.rows import Row
from fedfusion_flwr.experiments.work import Work


class Timed(NamedTuple):
    """Finished work: its group, the seconds that the suite says (0: none), the seconds it took."""

    group: str
    declared: float
    seconds: float


class Clock:
    """Expects what finished work of the same group took, or else what the suite says."""

    def __init__(self, finished: Iterable[Timed] = ()) -> None:
        self.finished = list(finished)

    @classmethod
    def of(cls, work: Iterable[Work], rows: Iterable[Row]) -> Clock:
        """A clock that knows these rows of the work."""
        clock, by_id = cls(), {one.id: one for one in work}
        for row in rows:
            clock.note(by_id[row["cell"]], row["seconds"])
        return clock

    def note(self, one: Work, seconds: float) -> None:
        """Remember what some work took."""
        self.finished.append(Timed(one.group, one.seconds, seconds))

    def expected_of(self, work: Iterable[Work]) -> float:
        """Seconds of all this work, one after the other."""
        return sum(self.expected(one.group, one.seconds) for one in work)

    def expected(self, group: str, declared: float) -> float:
        """Seconds; 0 where nothing is known.

        What the suite says is scaled by how far off it was for finished work of the same group, or,
        if there is none yet, for all.
        """
        same = [timed for timed in self.finished if timed.group == group]
        for known in (same, self.finished):
            if not declared and known:
                return statistics.mean(timed.seconds for timed in known)
            said = [timed for timed in known if timed.declared]
            if said:
                real = sum(timed.seconds for timed in said)
                return declared * real / sum(timed.declared for timed in said)
        return declared


def shown(seconds: float) -> str:
    """1 h 05 min, 12 min or 40 s."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min" if minutes >= 60 else f"{minutes} min"


def advice(work: Iterable[Work]) -> list[str]:
    """What makes these runs slower than the plan thinks, a sentence each."""
    ways = {(one.config.get("device"), one.config.get("precision")) for one in work}
    found = (
        slow_precision(choose_device(str(device or "auto")), str(precision))
        for device, precision in sorted(ways, key=str)
        # Each run itself says that a GPU is not there.
        if device != "cuda" or torch.cuda.is_available()
    )
    return list(dict.fromkeys(f"note: {sentence}" for sentence in found if sentence))
