# SPDX-License-Identifier: Apache-2.0
"""What benchmarks of speed share: clocks, memory, and a command line around named cases.

Each case runs in a process of its own and appends one row; tables show a case's newest row. Read
ratios within a row: absolute times depend on the machine and on who else uses it.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType

from fedfusion_flwr.experiments.rows import Row, append_row, identity, read_rows

Case = Callable[[], Row]
Columns = Mapping[str, Callable[[Row], object]]


def seconds(work: Callable[[], object]) -> float:
    """Wall time of one call."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def least_seconds(works: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Least wall time of each, taking turns, after one call of each that does not count."""
    best = dict.fromkeys(works, float("inf"))
    for repeat in range(repeats + 1):
        for name, work in works.items():
            spent = seconds(work)
            if repeat:
                best[name] = min(best[name], spent)
    return best


class PeakMemory:
    """While open, samples this process's resident memory; ``grown`` is the peak above its start."""

    def __init__(self) -> None:
        self.grown = 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> PeakMemory:
        self._start = resident_bytes()
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._done.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._done.wait(0.002):
            self.grown = max(self.grown, resident_bytes() - self._start)


def resident_bytes() -> int:
    """Resident memory of this process (Linux)."""
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * os.sysconf(
        "SC_PAGE_SIZE"
    )


def command_line(doc: str, results: Path, cases: Mapping[str, Case], columns: Columns) -> None:
    """Run all cases, or those that are named, and print the table.

    Parameters
    ----------
    doc : str
        The benchmark's docstring.
    results : Path
        Where rows are appended.
    cases : Mapping[str, Case]
        What each measures.
    columns : Columns
        The table's columns, by title.
    """
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="CASE", help=f"of {', '.join(cases)}")
    parser.add_argument("--table", action="store_true", help="only print the stored results")
    parser.add_argument("--here", action="store_true", help="in this process")
    arguments = parser.parse_args()
    unknown = sorted(set(arguments.names) - set(cases))
    if unknown:
        parser.error(f"unknown case {unknown[0]!r}; cases are {', '.join(cases)}")
    for name in () if arguments.table else arguments.names or cases:
        if arguments.here:
            about = identity()
            append_row(results, {"case": name, **cases[name](), **about})
        elif subprocess.run([sys.executable, sys.argv[0], name, "--here"], check=False).returncode:
            print(f"failed | {name}", file=sys.stderr)
    if not arguments.here:
        print(table(results, cases, columns))


def table(results: Path, cases: Mapping[str, Case], columns: Columns) -> str:
    """Markdown: the newest row of each case."""
    newest = {row["case"]: row for row in read_rows(results)}
    lines = [f"| {' | '.join(['case', *columns])} |", "|---" * (1 + len(columns)) + "|"]
    for name in cases:
        if name in newest:
            shown = [str(show(newest[name])) for show in columns.values()]
            lines.append(f"| {' | '.join([name, *shown])} |")
    return "\n".join(lines)
