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
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import pandas as pd
import torch
from scipy.optimize import linear_sum_assignment
from sklearn.cluster import KMeans
from sklearn.metrics import adjusted_rand_score, silhouette_score
from sklearn.mixture import GaussianMixture
from torch import Tensor
from torch.nn.functional import one_hot, pad

from benchmarks.in_process import run_in_processes
from benchmarks.measuring import least_seconds
from fedfusion_flwr.app.local import run_locally
from fedfusion_flwr.config import RunConfig
from fedfusion_flwr.data import partition_for
from fedfusion_flwr.experiments.rows import Row, append_row, identity, read_rows
from fedfusion_flwr.federation.replies import ClientReply
from fedfusion_flwr.federation.round import Update
from fedfusion_flwr.fusion import DistributionInference
from fedfusion_flwr.fusion.initialization import archetypes, clear_groups
from fedfusion_flwr.fusion.noise import FEWEST_RESIDUALS, Signals, signals
from fedfusion_flwr.fusion.standardizer import Standardizer
from fedfusion_flwr.randomness import derived_seed
from fedfusion_flwr.strategies import FedFusion

RESULTS = Path(__file__).parent / "results" / "inference-quality.jsonl"
ROUNDS = (5, 10, 20)
SEEDS = (0, 1, 2)
MOST = 8
"""Components that an inference may find, as many as FedFusion's default."""

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


class Remembered(NamedTuple):
    """What the server knows of K clients after a round.

    ``vectors`` are means over ``rounds`` rounds, ``smoothed`` the first version's moving averages,
    both (K, D); ``residuals`` (R, D) are draws of one round's noise, if there are any.
    """

    clients: list[int]
    vectors: Tensor
    smoothed: Tensor
    rounds: Tensor
    examples: Tensor
    residuals: Tensor | None


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


def whitened(known: Remembered) -> Signals:
    """The clients in the directions that stand above the noise, as the VAE sees them."""
    scaler, residuals = Standardizer.of(known.vectors), known.residuals
    noise = None
    if residuals is not None and len(residuals) >= FEWEST_RESIDUALS:
        noise = scaler.without_center().standardize(residuals)
    most = min(MOST, len(known.clients)) - 1
    return signals(scaler.standardize(known.vectors), known.rounds.double(), noise, most)


def hard(labels: np.ndarray) -> Tensor:
    """Labels (K,) as memberships (K, G)."""
    return one_hot(torch.as_tensor(labels, dtype=torch.int64)).double()


def k_means(x: Tensor) -> Tensor:
    """The first version's start: the most groups whose silhouette is 0.9 of the best or more."""
    points = x.double().numpy()
    if not points.shape[1]:
        return torch.ones(len(points), 1).double()
    found = {}
    for groups in range(2, min(MOST, len(points) - 1) + 1):
        labels = KMeans(groups, n_init=10, random_state=0).fit_predict(points)
        found[float(silhouette_score(points, labels)), groups] = labels
    best = max(score for score, _ in found)
    if best <= 0.1:
        return torch.ones(len(points), 1).double()
    most = max(groups for score, groups in found if score >= 0.9 * best)
    return next(hard(labels) for (_, groups), labels in found.items() if groups == most)


def gaussian_mixture(found: Signals) -> Tensor:
    """Responsibilities; the covariance's kind and the number of components by BIC.

    No component is narrower than the noise.
    """
    points = found.x.numpy()
    if not points.shape[1]:
        return torch.ones(len(points), 1).double()
    least = max(1e-6, float(found.variance.mean()))
    fitted = [
        GaussianMixture(
            groups, covariance_type=kind, n_init=5, reg_covar=least, random_state=0
        ).fit(points)
        for kind in ("spherical", "diag")
        for groups in range(1, min(MOST, len(points) - 1) + 1)
    ]
    chosen = min(fitted, key=lambda mixture: float(mixture.bic(points)))
    return torch.as_tensor(chosen.predict_proba(points))


def corners(x: Tensor) -> Tensor:
    """Memberships in P + 1 archetypes."""
    return archetypes(x, x.shape[1] + 1) if x.shape[1] else torch.ones(len(x), 1).double()


def vae_start(known: Remembered) -> Tensor:
    """What the VAE goes on from: clear groups, and archetypes where none are clear."""
    x = whitened(known).x
    labels = clear_groups(x, MOST) if x.shape[1] else None
    return corners(x) if labels is None else hard(labels.numpy())


def smoothed_k_means(known: Remembered) -> Tensor:
    """As the first version did it: nothing is known of the noise."""
    return k_means(Standardizer.of(known.smoothed).standardize(known.smoothed))


AT_ONCE: dict[str, Callable[[Remembered], Tensor]] = {
    "its start alone": vae_start,
    "k-means": smoothed_k_means,
    "k-means, whitened": lambda known: k_means(whitened(known).x),
    "Gaussian mixture": lambda known: gaussian_mixture(whitened(known)),
    "archetypes": lambda known: corners(whitened(known).x),
}
VAE, UNIFORM = "VAE", "uniform"
INFERENCES = (VAE, *AT_ONCE, UNIFORM)


def scores(b: Tensor, planted: Tensor, examples: Tensor) -> dict[str, float]:
    """How near memberships b (K, M) of clients with ``examples`` (K,) are to those planted."""
    width = max(b.shape[1], planted.shape[1])
    found, true = (pad(m, (0, width - m.shape[1])) for m in (b, planted))
    distances = (found.unsqueeze(2) - true.unsqueeze(1)).abs().mean(0) / 2
    _, order = linear_sum_assignment(distances.T.numpy())
    found = found[:, order]
    share = examples / examples.sum()
    main, groups = found.argmax(1).numpy(), true.argmax(1).numpy()
    return {
        "b-error": float((found - true).abs().sum(1).mean() / 2),
        "pi-error": float((share @ (found - true)).abs().sum() / 2),
        "occupied": len(np.unique(main)),
        "planted": len(np.unique(groups)),
        "adjusted-rand-index": float(adjusted_rand_score(groups, main)),
    }


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
    lines = [f"| | {' | '.join(INFERENCES)} |", "|---" * (1 + len(INFERENCES)) + "|"]
    for job in JOBS:
        if any(row["job"] == job for row in rows):
            errors = [_errors(found, job, name) for name in INFERENCES]
            lines.append(f"| {job} | {' | '.join(errors)} |")
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
