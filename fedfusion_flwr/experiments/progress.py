# SPDX-License-Identifier: Apache-2.0
"""How long the rest of a comparison will take."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from typing import NamedTuple


class Timed(NamedTuple):
    """A finished piece of work: its kind, what the suite says it takes (0: nothing), what it took.

    The kind is a cell's group.
    """

    kind: str
    declared: float
    seconds: float


class Clock:
    """Expects of work to come what finished work of its kind took, or else what the suite says."""

    def __init__(self, finished: Iterable[Timed] = ()) -> None:
        self.finished = list(finished)

    def expected(self, kind: str, declared: float) -> float:
        """Seconds; 0 where nothing is known.

        What the suite says is scaled by how much slower or faster than it said work of the same
        kind was, or where there is none yet, all work.
        """
        same = [timed for timed in self.finished if timed.kind == kind]
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
