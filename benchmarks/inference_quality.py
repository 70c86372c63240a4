# SPDX-License-Identifier: Apache-2.0
"""How well do inferences find the planted mixtures, all from the same statistics of real runs?

    python benchmarks/inference_quality.py --data-root PATH    # runs what is missing
    python benchmarks/inference_quality.py --table             # prints the stored results

PATH holds Fashion-MNIST; without it only what needs no data root runs. Every finished run is one
row of ``benchmarks/results/inference-quality.jsonl``; a run that is there already is not repeated.

FedFusion runs with its defaults, and after some rounds every inference answers from what the server
remembers by then. None is told the number of components, except the uniform one.
"""

from __future__ import annotations

import argparse
import functools
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import pandas as pd
import torch
from torch import Tensor

from benchmarks.in_process import run_in_processes
from benchmarks.inferences import AT_ONCE, MOST, Remembered, scores
from benchmarks.measuring import least_seconds
from fedfusion_flwr.app.local import run_locally
from fedfusion_flwr.config import RunConfig
from fedfusion_flwr.data import partition_for
from fedfusion_flwr.experiments.rows import Row, append_row, identity, read_rows
from fedfusion_flwr.federation.replies import ClientReply
from fedfusion_flwr.federation.round import Update
from fedfusion_flwr.fusion import DistributionInference
from fedfusion_flwr.randomness import derived_seed
from fedfusion_flwr.strategies import FedFusion

RESULTS = Path(__file__).parent / "results" / "inference-quality.jsonl"
ROUNDS = (5, 10, 20)
SEEDS = (0, 1, 2)

_COMMON = {"num-server-rounds": max(ROUNDS), "fraction-evaluate": 0.0, "checkpoint-every": 0}
_FASHION = {**_COMMON, "dataset": "fashion-mnist", "num-clients": 20, "train-examples": 5000}
_LONG_TAILED = {**_FASHION, "component-sizes": "long-tailed"}
JOBS: dict[str, dict[str, Any]] = {
    "README's": _COMMON,
    "components": {**_LONG_TAILED, "train-examples": 12000},
    "components, 10 of 60": {
        **_LONG_TAILED,
        "train-examples": 15000,
        "num-clients": 60,
        "fraction-train": 0.16667,
    },
    "rotate": {**_LONG_TAILED, "component-transform": "rotate", "planted-components": 4},
    "mixed 0.3": {**_FASHION, "component-mixing": 0.3},
    "mixed 0.6": {**_FASHION, "component-mixing": 0.6},
}


@dataclass(kw_only=True, eq=False, repr=False)
class NotingFedFusion(FedFusion):
    """FedFusion that keeps what it remembered after every round."""

    notes: list[Remembered] = field(default_factory=list, init=False)
    smoothed: dict[int, Tensor] = field(default_factory=dict, init=False)

    def advance(self, replies: list[ClientReply]) -> Update:
        memory = self.state.memory
        before = {i: (known.vector, known.rounds) for i, known in memory.clients.items()}
        update = super().advance(replies)
        for reply in replies:
            client = reply.client
            known = memory.clients[client]
            if client not in before:
                self.smoothed[client] = known.vector
                continue
            # This round's deviation, from two means in a row.
            vector, rounds = before[client]
            deviation = vector + (known.vector - vector) * (rounds + 1)
            self.smoothed[client] = torch.lerp(self.smoothed[client], deviation, 0.5)
        note = Remembered(
            memory.ids,
            memory.vectors(),
            torch.stack([self.smoothed[i] for i in memory.ids]),
            memory.rounds(),
            memory.num_examples(),
            memory.residuals,
        )
        self.notes.append(note)
        return update


VAE, UNIFORM = "VAE", "uniform"
INFERENCES = (VAE, *AT_ONCE, UNIFORM)


def answers(notes: list[Remembered], mixtures: Tensor, seed: int) -> list[Row]:
    """Each inference's scores after each of ROUNDS."""
    vae, found = DistributionInference(MOST, derived_seed(seed, "inference")), []
    for number, known in enumerate(notes, 1):
        started = time.perf_counter()
        # In every round, as FedFusion does.
        posterior = vae.fit(
            known.vectors, known.examples, rounds=known.rounds, residuals=known.residuals
        )
        spent = {VAE: time.perf_counter() - started, UNIFORM: 0.0}
        if number not in ROUNDS:
            continue
        planted = mixtures[known.clients]
        works = {name: functools.partial(infer, known) for name, infer in AT_ONCE.items()}
        given = {name: work() for name, work in works.items()}
        given[VAE] = posterior.assignments
        given[UNIFORM] = torch.full_like(planted, 1 / planted.shape[1])
        spent |= least_seconds(works, 1)
        found += [
            {
                "inference": name,
                "round": number,
                **scores(given[name], planted, known.examples),
                "milliseconds": round(1e3 * spent[name], 1),
            }
            for name in INFERENCES
        ]
    return found


def run_cell(job: str, seed: int, root: str = "") -> Row:
    """Run one federation in this process and return its row."""
    about, config = identity(), {**JOBS[job], "seed": seed}
    with tempfile.TemporaryDirectory() as folder:
        extra: dict[str, Any] = {
            "strategy": "benchmarks.inference_quality:NotingFedFusion",
            "central-evaluate-every": 1000,
            "output-dir": folder,
            "data-root": root if "dataset" in config else "",
        }
        outcome = run_locally({**config, **extra})
    mixtures = partition_for(RunConfig.from_run_config({**config, **extra})).mixtures
    notes = cast(NotingFedFusion, outcome.strategy).notes
    return {
        "job": job,
        "seed": seed,
        "config": config,
        "answers": answers(notes, torch.as_tensor(mixtures), seed),
        "digest": outcome.digest,
        **about,
    }


def means(rows: list[Row]) -> pd.DataFrame:
    """Means over the seeds, by job, inference and round."""
    flat = pd.json_normalize(rows, "answers", ["job", "seed"])
    grouped = flat.groupby(["job", "inference", "round"])
    return cast(pd.DataFrame, grouped.mean(numeric_only=True))


def table(rows: list[Row]) -> str:
    """Markdown: everything, by job and inference."""
    found = means(rows)
    lines = [
        f"| job | seeds | inference | error of b after {', '.join(map(str, ROUNDS))} rounds "
        "| error of pi | groups occupied, of planted | adjusted Rand index | ms |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for job in JOBS:
        seeds = len([row for row in rows if row["job"] == job])
        for name in INFERENCES if seeds else ():
            errors, last = _errors(found, job, name), found.loc[job, name, max(ROUNDS)]
            lines.append(
                f"| {job} | {seeds} | {name} | {errors} | {last['pi-error']:.2f} "
                f"| {last['occupied']:.1f} of {last['planted']:.1f} "
                f"| {last['adjusted-rand-index']:.2f} | {last['milliseconds']:.0f} |"
            )
    return "\n".join(lines)


def summary(rows: list[Row]) -> str:
    """Markdown: the errors of b alone, a line for each job."""
    found = means(rows)
    lines = [f"| job | seeds | {' | '.join(INFERENCES)} |", "|---" * (2 + len(INFERENCES)) + "|"]
    for job in JOBS:
        seeds = len([row for row in rows if row["job"] == job])
        if seeds:
            errors = [_errors(found, job, name) for name in INFERENCES]
            lines.append(f"| {job} | {seeds} | {' | '.join(errors)} |")
    return "\n".join(lines)


def _errors(found: pd.DataFrame, job: str, inference: str) -> str:
    values = found.loc[(job, inference), "b-error"]
    return " ".join(f"{values[number]:.2f}".removeprefix("0") for number in ROUNDS)


def run_missing(root: Path | None, workers: int) -> None:
    """Run every cell that has no row yet and whose data are here, each in a process of its own."""
    done = {(row["job"], row["seed"]) for row in read_rows(RESULTS)}
    ready = [job for job, config in JOBS.items() if root or "dataset" not in config]
    cells = [(job, seed) for seed in SEEDS for job in ready if (job, seed) not in done]
    run_in_processes(cells, [f"--data-root={root}"] if root else [], workers)


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data-root", type=Path, metavar="PATH", help="of Fashion-MNIST")
    parser.add_argument("--table", action="store_true", help="only print the stored results")
    parser.add_argument("--workers", type=int, default=1, help="processes side by side")
    parser.add_argument("--cell", nargs=2, metavar=("JOB", "SEED"))
    arguments = parser.parse_args()
    if arguments.cell:
        job, seed = arguments.cell
        append_row(RESULTS, run_cell(job, int(seed), str(arguments.data_root or "")))
        return
    if not arguments.table:
        run_missing(arguments.data_root, arguments.workers)
    rows = read_rows(RESULTS)
    print(table(rows), summary(rows), sep="\n\n")


if __name__ == "__main__":
    main()
