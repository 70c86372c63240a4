# SPDX-License-Identifier: Apache-2.0
"""The comparison: runs what a suite's folder lacks, one row a finished cell, then makes tables."""

from __future__ import annotations

import contextlib
import fcntl
import shutil
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from fedfusion_flwr.computation import choose_device, slow_precision
from fedfusion_flwr.errors import FedFusionError
from fedfusion_flwr.experiments.overrides import Overrides
from fedfusion_flwr.experiments.processes import Job, run_jobs
from fedfusion_flwr.experiments.progress import Clock, Timed, shown
from fedfusion_flwr.experiments.rows import Row, append_row, read_rows, write_rows, write_text
from fedfusion_flwr.experiments.suite import Suite, SuiteError
from fedfusion_flwr.experiments.tuning import scores, winners
from fedfusion_flwr.experiments.work import Machine, Work

FILES = ("tune.jsonl", "cells.jsonl", "centralized.jsonl")
FAILURES, OUTDATED = "failures.jsonl", "outdated.jsonl"


@dataclass
class Comparison:
    """One suite in one folder.

    Parameters
    ----------
    suite : Suite
        What is compared.
    machine : Machine
        Where the results lie and how jobs run.
    workers : int
        Jobs side by side.
    groups : collection of str
        Only these groups are run; empty: all.
    """

    suite: Suite
    machine: Machine
    workers: int = 1
    groups: Collection[str] = ()

    def __post_init__(self) -> None:
        known = {grid.name for grid in self.suite.grids}
        for group in self.groups:
            if group not in known:
                raise SuiteError(
                    f"suite '{self.suite.name}' has no group '{group}'; "
                    f"it has {', '.join(sorted(known))}"
                )
        self.folder = self.machine.folder

    def tune(self) -> int:
        """Run the cells of the tuning; the number of those that failed."""
        return self._run(self._tuning())

    def run(self) -> int:
        """Run everything that is missing; the number of cells that failed."""
        failed = self.tune()
        tuned = self.winners()
        for strategy in self.suite.tuning.candidates if self.suite.tuning else ():
            if strategy not in tuned:
                print(f"no candidate of '{strategy}' finished: it runs with the suite's own keys")
        work = self._compared()
        self._set_aside_outdated(work)
        return failed + self._run(self._wanted(work))

    def plan(self) -> str:
        """What there is to do, and about how long it takes."""
        work = [*self._tuning(), *self._wanted(self._compared())]
        todo = {one.id for one in self._missing(work)}
        clock = self._clock(work)
        lines, total = [], 0.0
        for group in dict.fromkeys(one.group for one in work):
            of = [one for one in work if one.group == group]
            left = [one for one in of if one.id in todo]
            seconds = sum(clock.expected(one.group, one.seconds) for one in left)
            total += seconds
            lines.append(
                f"{group}: {len(of)} cells, {len(left)} to do, about "
                f"{shown(seconds / max(len(left), 1))} each, {shown(seconds / self.workers)} in all"
            )
        lines.append(
            f"{len(todo)} of {len(work)} cells to do: about {shown(total / self.workers)} with "
            f"{self.workers} at a time (engine {self.machine.engine})"
        )
        lines += _advice(one for one in work if one.id in todo)
        return "\n".join(lines)

    def rows(self) -> list[Row]:
        """The rows of the groups' cells as the suite has them now."""
        return self._stored("cells.jsonl", self._compared())

    def winners(self) -> dict[str, Overrides]:
        """The tuned keys of every strategy whose tuning is finished."""
        if self.suite.tuning is None:
            return {}
        return winners(self.suite.tuning, self._stored("tune.jsonl", self._tuning()))

    def tuning_rows(self) -> list[Row]:
        """What every candidate reached, as a table."""
        if self.suite.tuning is None:
            return []
        reached = scores(self.suite.tuning, self._stored("tune.jsonl", self._tuning()))
        chosen = self.winners()
        return [
            {
                "strategy": strategy,
                "candidate": ", ".join(f"{key} = {value}" for key, value in candidate.items()),
                "metric": self.suite.tuning.metrics[strategy],
                "score": reached[strategy].get(number),
                "chosen": candidate is chosen.get(strategy),
            }
            for strategy, candidates in self.suite.tuning.candidates.items()
            for number, candidate in enumerate(candidates)
        ]

    def _tuning(self) -> list[Work]:
        return list(self.suite.tune_cells())

    def _compared(self) -> list[Work]:
        return [*self.suite.cells(self.winners()), *self.suite.references()]

    def _wanted(self, work: Sequence[Work]) -> list[Work]:
        return [one for one in work if not self.groups or one.group in self.groups]

    def _stored(self, name: str, work: Iterable[Work]) -> list[Row]:
        """The rows of a file that belong to this work, in its order."""
        found = {row["cell"]: row for row in read_rows(self.folder / name)}
        of = [one for one in work if one.file == name and one.id in found]
        return [found[one.id] for one in of if one.is_row(found[one.id])]

    def _missing(self, work: Sequence[Work]) -> list[Work]:
        done = {row["cell"] for name in FILES for row in self._stored(name, work)}
        return [one for one in work if one.id not in done]

    def _clock(self, work: Sequence[Work]) -> Clock:
        of = {one.id: one for one in work}
        return Clock(
            Timed(of[row["cell"]].group, of[row["cell"]].seconds, row["seconds"])
            for name in FILES
            for row in self._stored(name, work)
        )

    def _set_aside_outdated(self, work: Sequence[Work]) -> None:
        """Move rows that the suite no longer has, or has with another config, to a file apart."""
        work = [*self._tuning(), *work]
        for name in FILES:
            rows, kept = read_rows(self.folder / name), self._stored(name, work)
            if len(rows) == len(kept):
                continue
            for row in rows:
                if row not in kept:
                    append_row(self.folder / OUTDATED, {"file": name, **row})
            write_rows(self.folder / name, kept)
            print(
                f"{len(rows) - len(kept)} rows of {name} are not of this suite any more, or not "
                f"with this config: they lie in {OUTDATED} now",
                flush=True,
            )

    def _run(self, work: Sequence[Work]) -> int:
        """Run what is missing of this; every row is on disk before the next is waited for."""
        missing = self._missing(work)
        if not missing:
            return 0
        self._repair()
        write_text(self.folder / "suite.toml", self.suite.text)
        self._forget_failures({one.id for one in missing})
        clock, left = self._clock(work), {one.id: one for one in missing}
        failed = 0
        jobs = run_jobs((self._prepared(one) for one in missing), self.workers)
        with contextlib.closing(jobs):
            for job, result in jobs:
                one = left.pop(job.id)
                if "row" in result:
                    row = {**one.factors(), **result["row"]}
                    append_row(self.folder / one.file, row)
                    self._tidy(one, job.folder)
                    clock.finished.append(Timed(one.group, one.seconds, row["seconds"]))
                    outcome = _outcome(row)
                else:
                    failed += 1
                    append_row(self.folder / FAILURES, {**one.factors(), **result})
                    outcome = f"FAILED: {result['error']}"
                rest = sum(clock.expected(o.group, o.seconds) for o in left.values())
                print(
                    f"[{len(missing) - len(left)}/{len(missing)}] {one.id} | {outcome} | "
                    f"about {shown(rest / self.workers)} left",
                    flush=True,
                )
        return failed

    def _prepared(self, one: Work) -> Job:
        job = one.job(self.machine)
        # What an interrupted or failed attempt has left.
        shutil.rmtree(job.folder, ignore_errors=True)
        return job

    def _repair(self) -> None:
        """Cut off a last line that an interruption left incomplete."""
        for name in (*FILES, FAILURES, OUTDATED):
            path = self.folder / name
            if path.exists() and not path.read_text(encoding="utf-8").endswith("\n"):
                write_rows(path, read_rows(path))

    def _forget_failures(self, retried: Collection[str]) -> None:
        path = self.folder / FAILURES
        rows = read_rows(path)
        if rows:
            write_rows(path, [row for row in rows if row["cell"] not in retried])

    def _tidy(self, one: Work, folder: Path) -> None:
        """Remove the files of a finished run that the suite does not keep."""
        if one.file != "cells.jsonl":
            shutil.rmtree(folder)
        elif self.suite.keep is not None:
            for path in folder.iterdir():
                if path.name not in self.suite.keep:
                    shutil.rmtree(path) if path.is_dir() else path.unlink()


def _advice(work: Iterable[Work]) -> list[str]:
    """What makes these runs slower than the plan thinks, a sentence each."""
    ways = {(one.config.get("device"), one.config.get("precision")) for one in work}
    found = (
        slow_precision(choose_device(str(device or "auto")), str(precision))
        for device, precision in sorted(ways, key=str)
        # A GPU that is not there is a sentence of each run itself.
        if device != "cuda" or torch.cuda.is_available()
    )
    return list(dict.fromkeys(f"note: {sentence}" for sentence in found if sentence))


def _outcome(row: Row) -> str:
    rounds = row.get("metrics", [])
    accuracies = row.get("accuracy") or [r["global-accuracy"] for r in rounds]
    return f"accuracy {accuracies[-1]:.4f} in {shown(row['seconds'])}"


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """While open, no other comparison may write to the folder.

    Raises
    ------
    FedFusionError
        If one does.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as problem:
            raise FedFusionError(
                f"another comparison is writing to '{folder}': wait for it, end it, or choose "
                "another --output"
            ) from problem
        yield
