# SPDX-License-Identifier: Apache-2.0
"""Results to report on: a suite whose numbers are made by hand, and one that was really run."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from fedfusion_flwr.experiments.compare import Comparison
from fedfusion_flwr.experiments.jobs import Job, work
from fedfusion_flwr.experiments.suite import parse_suite
from fedfusion_flwr.experiments.work import Machine

Row = dict[str, Any]

ABOUT = {
    "digest": "0" * 64,
    "seconds": 1.5,
    "python": "3.11.2",
    "torch": "2.14.1",
    "flwr": "1.41.0",
    "commit": "abcdef1",
    "machine": "2 cores, x86_64",
}


def metrics(accuracies: Sequence[float | None], personalized: float | None = None) -> list[Row]:
    """Rounds 0, 1, ... of which each but the first sends 3 kB, receives 1 kB and takes 7 steps."""
    costs = {"bytes-down": 3000.0, "bytes-up": 1000.0, "client-steps": 7.0}
    rows: list[Row] = [
        {"round": n, "global-accuracy": a, "global-loss": 2.0 / (n + 1)} | (costs if n else {})
        for n, a in enumerate(accuracies)
    ]
    if personalized is not None:
        rows[-1]["personalized-accuracy"] = personalized
    return rows


def cell(
    strategy: str,
    seed: int,
    rows: list[Row],
    *,
    group: str = "main",
    partition: str = "components",
    **config: Any,
) -> Row:
    """A line of ``cells.jsonl``; keys of the config with underscores."""
    config = {key.replace("_", "-"): value for key, value in config.items()}
    varied = "-".join(f"{key}-{value}" for key, value in config.items())
    return {
        "cell": f"{group}-{strategy}-{partition}-{varied}-{seed}",
        "strategy": strategy,
        "dataset": "mnist-5k",
        "model": "lenet",
        "partition": partition,
        "seed": seed,
        "group": group,
        "config": {"strategy": strategy, "seed": seed, **config},
        "metrics": rows,
        **ABOUT,
    }


def reference(seed: int, batch_seed: int, accuracy: list[float], **config: Any) -> Row:
    """A line of ``centralized.jsonl``."""
    return {
        "dataset": "mnist-5k",
        "model": "lenet",
        "seed": seed,
        "batch_seed": batch_seed,
        "config": config,
        "accuracy": accuracy,
        "steps": 100,
        "model_file": f"models/{seed}-{batch_seed}.safetensors",
    }


def write_suite(folder: Path, cells: list[Row], references: list[Row] = []) -> Path:  # noqa: B006
    """A suite's folder as `fedfusion compare` leaves it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "suite.toml").write_text("# by a test\n")
    write_lines(folder / "cells.jsonl", cells)
    if references:
        write_lines(folder / "centralized.jsonl", references)
    return folder


def write_lines(path: Path, rows: list[Row]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def lines(path: Path) -> list[Row]:
    """The rows of a file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def copied(suite: Path, folder: Path, *without: str) -> Path:
    """The suite and what its report has stored, without the report and these."""
    shutil.copytree(suite, folder, ignore=shutil.ignore_patterns("report", *without))
    return folder


def read_csv(folder: Path, name: str) -> list[dict[str, str]]:
    """The rows of a picture's CSV; there must be just one of that beginning."""
    (path,) = sorted(folder.glob(f"report/figures/{name}*.csv"))
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


PICTURES = {
    *("accuracy", "loss", "accuracy-last", "recovery", "bias", "bias-distributions"),
    *(f"inferred-{what}" for what in ("clients", "assignments", "mixture", "components")),
}
"""Beginnings of the names of a setting's pictures."""

# --- a suite that was run -------------------------------------------------------------------------

REAL_STRATEGIES = ("fedfusion", "fedavg", "fed-gn", "ifca")
REAL_SUITE = f"""
[common]
num-clients = 6
num-server-rounds = 2
planted-components = 2
num-components = 3
validation-fraction = 0.2
evaluate-every = 2
vae-steps = 20
vae-refit-steps = 5
num-clusters = 2
warmup-rounds = 1

# Stripes; there are published figures for a data set of this name.
[datasets.fashion-mnist]
dataset = "npz"

[[groups]]
name = "main"
strategies = {list(REAL_STRATEGIES)}
datasets = ["fashion-mnist"]
models = ["lenet"]
partitions = ["components"]
seeds = [0, 1]

[centralized]
batch-seeds = [0, 1]
"""


def cell_name(strategy: str, seed: int) -> str:
    """The id of a run of that suite."""
    return f"main-fashion-mnist-lenet-components-{strategy}-s{seed}"


def write_small_images(path: Path) -> None:
    """Four classes of 8x8 pictures, each with a column of its own lit."""
    generator = np.random.default_rng(0)
    arrays = {}
    for split, count in (("train", 480), ("test", 80)):
        labels = np.arange(count) % 4
        pixels = generator.integers(0, 120, (count, 8, 8))
        pixels[np.arange(count), :, 2 * labels] = 255
        arrays |= {f"x_{split}": pixels.astype(np.uint8), f"y_{split}": labels}
    np.savez(path, **arrays)


def jobs_here(jobs: Iterable[Job], workers: int) -> Iterator[tuple[Job, Row]]:
    """In place of `run_jobs`: the same work, one after the other in this process."""
    for job in jobs:
        job.folder.mkdir(parents=True, exist_ok=True)
        yield job, json.loads(json.dumps({"row": work(**job.arguments)}))


def run_suite(folder: Path, images: Path, suite: str = REAL_SUITE) -> Path:
    """Four strategies, two seeds, two rounds; and two centralized models of each seed."""
    machine = Machine(folder, "in-process", data_roots={"fashion-mnist": str(images)})
    with mock.patch("fedfusion_flwr.experiments.compare.run_jobs", jobs_here):
        assert Comparison(parse_suite(suite, "real"), machine).run() == 0
    return folder
