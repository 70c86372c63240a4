# SPDX-License-Identifier: Apache-2.0
"""The comparison: runs what a suite's folder lacks, one row a finished cell, then makes tables."""

from __future__ import annotations

import contextlib
import math
import shutil
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from pandas import DataFrame

from fedfusion_flwr.experiments.jobs import Job, run_jobs
from fedfusion_flwr.experiments.progress import Clock, advice, shown
from fedfusion_flwr.experiments.results import CENTRALIZED, rounds_table
from fedfusion_flwr.experiments.rows import (
    Row,
    append_row,
    files_of,
    put_row,
    read_all,
    read_rows,
    write_rows,
    write_text,
)
from fedfusion_flwr.experiments.suite import Suite, SuiteError
from fedfusion_flwr.experiments.tuning import candidates, winners
from fedfusion_flwr.experiments.work import CELLS, TUNE, Machine, Overrides, Work

KINDS = (TUNE, CENTRALIZED, CELLS)
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
        Only these groups are run, and the references that they are compared with; empty: all.
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
        """Run the cells of the tuning; the number that failed."""
        return self._run(self._missing(self.suite.tune_cells()))

    def run(self) -> int:
        """Run everything that is missing; the number of cells that failed.

        The references come first: a run's job compares its model with theirs, and a reference's
        with those that saw the batches in an earlier order.
        """
        failed = self.tune()
        tuned = self.winners()
        for strategy in self.suite.tuning.candidates if self.suite.tuning else ():
            if strategy not in tuned:
                print(f"no candidate of '{strategy}' finished: it runs with the suite's own keys")
        self._set_aside_outdated()
        waves: dict[float, list[Work]] = {}
        for one in self._missing(self._wanted()):
            wave = math.inf if one.batch_seed is None else one.batch_seed
            waves.setdefault(wave, []).append(one)
        return failed + self._run(*(waves[number] for number in sorted(waves)))

    def plan(self) -> str:
        """What there is to do, and about how long it takes."""
        work = [*self.suite.tune_cells(), *self._wanted()]
        todo = {one.id for one in self._missing(work)}
        clock = Clock.of(work, self._stored(work))
        lines, total = [], 0.0
        for group in dict.fromkeys(one.group for one in work):
            of = [one for one in work if one.group == group]
            left = [one for one in of if one.id in todo]
            seconds = clock.expected_of(left)
            total += seconds
            lines.append(
                f"{group}: {len(of)} cells, {len(left)} to do, about "
                f"{shown(seconds / max(len(left), 1))} each, {shown(seconds / self.workers)} in all"
            )
        lines.append(
            f"{len(todo)} of {len(work)} cells to do: about {shown(total / self.workers)} with "
            f"{self.workers} at a time (engine {self.machine.engine})"
        )
        lines += advice(one for one in work if one.id in todo)
        return "\n".join(lines)

    def rows(self) -> list[Row]:
        """The rows of the cells as the suite has them now."""
        return self._stored(one for one in self._compared() if one.kind == CELLS)

    def tuning_table(self) -> DataFrame:
        """The score of every candidate; empty without a tuning."""
        if self.suite.tuning is None:
            return DataFrame()
        return candidates(self.suite.tuning, self._stored(self.suite.tune_cells()))

    def winners(self) -> dict[str, Overrides]:
        """The tuned keys of every strategy whose tuning is finished."""
        tuning = self.suite.tuning
        return {} if tuning is None else winners(tuning, self.tuning_table())

    def _compared(self) -> list[Work]:
        return [*self.suite.references(), *self.suite.cells(self.winners())]

    def _wanted(self) -> list[Work]:
        """The work of the groups, and the references that serve it."""
        work = self._compared()
        if not self.groups:
            return work
        cells = [one for one in work if one.group in self.groups]
        return [*_serving(work, cells), *cells]

    def _stored(self, work: Iterable[Work]) -> list[Row]:
        """The rows that belong to this work, in its order, the newest of each.

        References that two machines trained may differ in their last bits: both stay.
        """
        of = {one.id: one for one in work}
        found: dict[tuple[str, str], Row] = {}
        for kind in {one.kind for one in of.values()}:
            for row in read_all(self.folder, kind):
                one = of.get(row["cell"])
                if one is not None and one.kind == kind and one.has_row(row):
                    found[one.id, str(row.get("digest")) if kind == CENTRALIZED else ""] = row
        order = {id_: number for number, id_ in enumerate(of)}
        return sorted(found.values(), key=lambda row: order[row["cell"]])

    def _missing(self, work: Sequence[Work]) -> list[Work]:
        """Work without a row, and references that it needs, whose models are not here."""
        done = {row["cell"] for row in self._stored(work)}
        missing = [one for one in work if one.id not in done]
        needed = _serving(work, missing)
        done -= {one.id for one in needed if not (self.folder / one.model_file).exists()}
        return [one for one in work if one.id not in done]

    def _set_aside_outdated(self) -> None:
        """Move rows that the suite no longer has, or has with another config, to a file apart."""
        kept = self._stored([*self.suite.tune_cells(), *self._compared()])
        for path in (path for kind in KINDS for path in files_of(self.folder, kind)):
            rows = read_rows(path)
            outdated = [row for row in rows if row not in kept]
            if not outdated:
                continue
            for row in outdated:
                append_row(self.folder / OUTDATED, {"file": path.name, **row})
            write_rows(path, [row for row in rows if row in kept])
            print(
                f"{len(outdated)} rows of {path.name} are not of this suite any more, or not "
                f"with this config: they are in {OUTDATED} now",
                flush=True,
            )

    def _run(self, *waves: Sequence[Work]) -> int:
        """Run this, wave after wave; every row is on disk before the next job is waited for."""
        left = {one.id: one for wave in waves for one in wave}
        if not left:
            return 0
        self._repair()
        write_text(self.folder / "suite.toml", self.suite.text)
        if failures := read_rows(self.folder / FAILURES):
            others = [row for row in failures if row["cell"] not in left]
            write_rows(self.folder / FAILURES, others)
        work = [*self.suite.tune_cells(), *self._compared()]
        clock = Clock.of(work, self._stored(work))
        total, failed = len(left), 0
        for wave in waves:
            jobs = run_jobs((self._prepared(one) for one in wave), self.workers)
            with contextlib.closing(jobs):
                for job, result in jobs:
                    one = left.pop(job.id)
                    failed += "row" not in result
                    outcome = self._booked(one, result, job.folder, clock)
                    rest = clock.expected_of(left.values())
                    print(
                        f"[{total - len(left)}/{total}] {one.id} | {outcome} | "
                        f"about {shown(rest / self.workers)} left",
                        flush=True,
                    )
        return failed

    def _booked(self, one: Work, result: Row, job_folder: Path, clock: Clock) -> str:
        """Write down what became of a job; in a few words."""
        if "row" not in result:
            append_row(self.folder / FAILURES, {**one.factors(), **result})
            return f"FAILED: {result['error']}"
        row = {**one.factors(), **result["row"]}
        path = self.folder / f"{one.kind}.jsonl"
        if one.kind == CENTRALIZED:
            put_row(path, row, "cell", "digest")
            accuracy = row["accuracy"][-1]
        else:
            append_row(path, row)
            accuracy = rounds_table([row["metrics"]])["global-accuracy"].dropna().iat[-1]
        self._tidy(one, job_folder)
        clock.note(one, row["seconds"])
        return f"accuracy {accuracy:.4f} in {shown(row['seconds'])}"

    def _prepared(self, one: Work) -> Job:
        job = one.job(self.machine, self._models_for(one))
        # What an interrupted or failed attempt has left.
        shutil.rmtree(job.folder, ignore_errors=True)
        return job

    def _models_for(self, one: Work) -> list[Row]:
        """The references whose models are here and with which this work's is compared.

        For a run those of its seed, which began as the same model, or all if there are none; for a
        reference those of its seed that saw the batches in an earlier order.
        """
        if one.kind != CENTRALIZED and not one.is_compared:
            return []
        of = {r.id: r for r in self.suite.references() if r.serves(one)}
        # Of two rows of one id the last is of the model that is here.
        rows = {row["cell"]: row for row in self._stored(of.values())}
        here = [r for r in of.values() if r.id in rows and (self.folder / r.model_file).exists()]
        chosen = [r for r in here if r.seed == one.seed]
        if one.batch_seed is not None:
            chosen = [r for r in chosen if (r.batch_seed or 0) < one.batch_seed]
        elif not chosen:
            chosen = here
        return [
            {
                "config": rows[r.id]["config"],
                "model_file": str(self.folder.resolve() / r.model_file),
                "digest": rows[r.id].get("digest") or "",
            }
            for r in chosen
        ]

    def _repair(self) -> None:
        """Cut off a last line that an interruption left incomplete."""
        paths = [path for kind in KINDS for path in files_of(self.folder, kind)]
        for path in (*paths, self.folder / FAILURES, self.folder / OUTDATED):
            if path.exists() and not path.read_text(encoding="utf-8").endswith("\n"):
                write_rows(path, read_rows(path))

    def _tidy(self, one: Work, folder: Path) -> None:
        """Remove the files of a finished run that the suite does not keep."""
        if one.kind != CELLS:
            shutil.rmtree(folder)
        elif self.suite.keep is not None:
            for path in folder.iterdir():
                if path.name not in self.suite.keep:
                    shutil.rmtree(path) if path.is_dir() else path.unlink()


def _serving(work: Iterable[Work], cells: Iterable[Work]) -> list[Work]:
    """The references with which these cells are compared."""
    compared = [one for one in cells if one.is_compared]
    return [one for one in work if any(one.serves(cell) for cell in compared)]
