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
from fedfusion_flwr.experiments.progress import Clock, Timed, advice, shown
from fedfusion_flwr.experiments.results import CENTRALIZED, rounds_table
from fedfusion_flwr.experiments.rows import (
    Row,
    append_row,
    files_of,
    put_row,
    read_rows,
    write_rows,
    write_text,
)
from fedfusion_flwr.experiments.suite import Suite, SuiteError
from fedfusion_flwr.experiments.tuning import candidates, winners
from fedfusion_flwr.experiments.work import (
    CELLS,
    TUNE,
    Machine,
    Overrides,
    Reference,
    Work,
    is_row_of,
)

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
        return self._run(self._missing(self._tuning()))

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
        work = self._compared()
        self._set_aside_outdated(work)
        waves: dict[float, list[Work]] = {}
        for one in self._missing(self._wanted(work)):
            wave = one.batch_seed if isinstance(one, Reference) else math.inf
            waves.setdefault(wave, []).append(one)
        return failed + self._run(*(waves[number] for number in sorted(waves)))

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
        lines += advice(one for one in work if one.id in todo)
        return "\n".join(lines)

    def rows(self) -> list[Row]:
        """The rows of the groups' cells as the suite has them now."""
        return self._stored(CELLS, self._compared())

    def tuning_table(self) -> DataFrame:
        """The score of every candidate; empty without a tuning."""
        if self.suite.tuning is None:
            return DataFrame()
        return candidates(self.suite.tuning, self._stored(TUNE, self._tuning()))

    def winners(self) -> dict[str, Overrides]:
        """The tuned keys of every strategy whose tuning is finished."""
        tuning = self.suite.tuning
        return {} if tuning is None else winners(tuning, self.tuning_table())

    def _tuning(self) -> list[Work]:
        return list(self.suite.tune_cells())

    def _compared(self) -> list[Work]:
        return [*self.suite.references(), *self.suite.cells(self.winners())]

    def _wanted(self, work: Sequence[Work]) -> list[Work]:
        """The work of the groups, and the references that serve it."""
        if not self.groups:
            return list(work)
        cells = [one for one in work if one.group in self.groups]
        return [*_serving(work, cells), *cells]

    def _stored(self, kind: str, work: Iterable[Work]) -> list[Row]:
        """The rows of a kind that belong to this work, in its order, the newest of each.

        References that two machines trained may differ in their last bits: both stay.
        """
        of = {one.id: one for one in work if one.kind == kind}
        found: dict[tuple[str, str], Row] = {}
        for row in (row for path in files_of(self.folder, kind) for row in read_rows(path)):
            one = of.get(row["cell"])
            if one is not None and is_row_of(row, one):
                found[one.id, str(row.get("digest")) if kind == CENTRALIZED else ""] = row
        order = {id_: number for number, id_ in enumerate(of)}
        return sorted(found.values(), key=lambda row: order[row["cell"]])

    def _missing(self, work: Sequence[Work]) -> list[Work]:
        """Work without a row, and references that it needs, whose models are not here."""
        done = {row["cell"] for kind in KINDS for row in self._stored(kind, work)}
        missing = [one for one in work if one.id not in done]
        needed = _serving(work, missing)
        done -= {one.id for one in needed if not one.model_file(self.folder).exists()}
        return [one for one in work if one.id not in done]

    def _clock(self, work: Sequence[Work]) -> Clock:
        of = {one.id: one for one in work}
        return Clock(
            Timed(of[row["cell"]].group, of[row["cell"]].seconds, row["seconds"])
            for kind in KINDS
            for row in self._stored(kind, work)
        )

    def _set_aside_outdated(self, work: Sequence[Work]) -> None:
        """Move rows that the suite no longer has, or has with another config, to a file apart."""
        work = [*self._tuning(), *work]
        for kind in KINDS:
            kept = self._stored(kind, work)
            for path in files_of(self.folder, kind):
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
        missing = [one for wave in waves for one in wave]
        if not missing:
            return 0
        self._repair()
        write_text(self.folder / "suite.toml", self.suite.text)
        self._forget_failures({one.id for one in missing})
        clock = self._clock([*self._tuning(), *self._compared()])
        left = {one.id: one for one in missing}
        failed = 0
        for wave in waves:
            jobs = run_jobs((self._prepared(one) for one in wave), self.workers)
            with contextlib.closing(jobs):
                for job, result in jobs:
                    one = left.pop(job.id)
                    failed += "row" not in result
                    outcome = self._booked(one, result, job.folder, clock)
                    rest = sum(clock.expected(o.group, o.seconds) for o in left.values())
                    print(
                        f"[{len(missing) - len(left)}/{len(missing)}] {one.id} | {outcome} | "
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
        else:
            append_row(path, row)
        self._tidy(one, job_folder)
        clock.finished.append(Timed(one.group, one.seconds, row["seconds"]))
        if one.kind == CENTRALIZED:
            accuracy = row["accuracy"][-1]
        else:
            accuracy = rounds_table([row["metrics"]])["global-accuracy"].dropna().iat[-1]
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
        references = {r.id: r for r in self.suite.references() if r.serves(one)}
        rows = self._stored(CENTRALIZED, references.values())
        # Of two rows of one id the last is of the model that is here.
        here = {
            row["cell"]: {
                "config": row["config"],
                "model_file": str(references[row["cell"]].model_file(self.folder.resolve())),
                "digest": row.get("digest") or "",
            }
            for row in rows
            if references[row["cell"]].model_file(self.folder).exists()
        }
        same = [r for r in references.values() if r.id in here and r.seed == one.seed]
        if isinstance(one, Reference):
            return [here[r.id] for r in same if r.batch_seed < one.batch_seed]
        if not one.is_compared:
            return []
        return [here[r.id] for r in same] or list(here.values())

    def _repair(self) -> None:
        """Cut off a last line that an interruption left incomplete."""
        paths = [path for kind in KINDS for path in files_of(self.folder, kind)]
        for path in (*paths, self.folder / FAILURES, self.folder / OUTDATED):
            if path.exists() and not path.read_text(encoding="utf-8").endswith("\n"):
                write_rows(path, read_rows(path))

    def _forget_failures(self, retried: Collection[str]) -> None:
        path = self.folder / FAILURES
        rows = read_rows(path)
        if rows:
            write_rows(path, [row for row in rows if row["cell"] not in retried])

    def _tidy(self, one: Work, folder: Path) -> None:
        """Remove the files of a finished run that the suite does not keep."""
        if one.kind != CELLS:
            shutil.rmtree(folder)
        elif self.suite.keep is not None:
            for path in folder.iterdir():
                if path.name not in self.suite.keep:
                    shutil.rmtree(path) if path.is_dir() else path.unlink()


def _serving(work: Iterable[Work], cells: Iterable[Work]) -> list[Reference]:
    """The references with which these cells are compared."""
    compared = [one for one in cells if one.is_compared]
    references = (one for one in work if isinstance(one, Reference))
    return [one for one in references if any(one.serves(cell) for cell in compared)]
