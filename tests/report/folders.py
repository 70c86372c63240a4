# SPDX-License-Identifier: Apache-2.0
"""Results to report on: a suite whose numbers are made by hand, and one that was really run."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from flwr.app import Context, RecordDict
from safetensors.torch import save_file

from client_app import app
from fedfusion_flwr.app.server import run
from fedfusion_flwr.app.training import evaluate, train
from fedfusion_flwr.config import RunConfig
from fedfusion_flwr.data import central_test_data, data_for
from fedfusion_flwr.federation.in_process_grid import InProcessGrid
from fedfusion_flwr.models import model_for
from fedfusion_flwr.tracking import state_digest

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


def metrics(accuracies: list[float], personalized: float | None = None) -> list[Row]:
    """Rounds 0, 1, ... of which each but the first sends 3 kB, receives 1 kB and takes 7 steps."""
    rows: list[Row] = [{"round": 0, "global-accuracy": accuracies[0], "global-loss": 2.0}]
    rows += [
        {
            "round": number,
            "global-accuracy": accuracy,
            "global-loss": 2.0 / (number + 1),
            "bytes-down": 3000.0,
            "bytes-up": 1000.0,
            "client-steps": 7.0,
        }
        for number, accuracy in enumerate(accuracies[1:], 1)
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
    told = {key.replace("_", "-"): value for key, value in config.items()}
    varied = "-".join(f"{key}-{value}" for key, value in told.items())
    return {
        "cell": f"{group}-{strategy}-{partition}-{varied}-{seed}",
        "strategy": strategy,
        "dataset": "mnist-5k",
        "model": "lenet",
        "partition": partition,
        "seed": seed,
        "group": group,
        "config": {"strategy": strategy, "seed": seed, **told},
        "metrics": rows,
        "summary": {},
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


LARGE = ("runs", "models")
"""Folders of a suite that git ignores."""

# --- a suite that was run -------------------------------------------------------------------------

REAL_CLIENTS = 6
REAL_CONFIG: Row = {
    "dataset": "npz",
    "num-clients": REAL_CLIENTS,
    "num-server-rounds": 2,
    "partition": "components",
    "planted-components": 2,
    "num-components": 3,
    "validation-fraction": 0.2,
    "checkpoint-every": 0,
    "evaluate-every": 2,
    "vae-steps": 20,
    "vae-refit-steps": 5,
    "num-clusters": 2,
    "warmup-rounds": 1,
}
REAL_DATASET = "fashion-mnist"
"""What the suite calls its stripes: a name for which there are published figures."""
REAL_STRATEGIES = ("fedfusion", "fedavg", "fed-gn", "ifca")


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


def run_suite(folder: Path, images: Path) -> Path:
    """Four strategies, two seeds, two rounds; and two centralized models of each seed."""
    config = {**REAL_CONFIG, "data-root": str(images)}
    rows = []
    for strategy in REAL_STRATEGIES:
        for seed in (0, 1):
            name = f"{strategy}-{seed}"
            own = {**config, "strategy": strategy, "seed": seed}
            directory = folder / "runs" / name
            context = Context(1, 0, {}, RecordDict(), {**own, "output-dir": str(directory)})
            outcome = run(InProcessGrid(app, REAL_CLIENTS, context.run_config), context)
            told = (directory / "metrics.jsonl").read_text().splitlines()
            row = cell(strategy, seed, [json.loads(line) for line in told])
            about = {"cell": name, "dataset": REAL_DATASET, "digest": outcome.digest}
            rows.append({**row, **about, "config": _shared(own)})
    references = [_train(folder, {**config, "seed": seed}, order) for seed in (0, 1)
                  for order in (0, 1)]  # fmt: skip
    return write_suite(folder, rows, references)


def _train(folder: Path, config: Row, batch_seed: int) -> Row:
    checked = RunConfig.from_run_config(config)
    data = data_for(checked)
    model = model_for(checked, data)
    result = train(
        model,
        data.inputs(data.x_train),
        data.y_train,
        epochs=2,
        batch_size=32,
        learning_rate=0.02,
        momentum=0.9,
        weight_decay=1e-4,
        generator=torch.Generator().manual_seed(batch_seed),
    )
    _, accuracy = evaluate(model, *central_test_data(checked))
    row = reference(checked.seed, batch_seed, [accuracy])
    (folder / "models").mkdir(exist_ok=True)
    save_file(model.state_dict(), folder / row["model_file"])
    about = {"dataset": REAL_DATASET, "digest": state_digest(model.state_dict())}
    return {**row, **about, "config": _shared(config), "steps": result.steps}


def _shared(config: Row) -> Row:
    """What a row says of a config: not where the data lies on this machine."""
    return {key: value for key, value in config.items() if key != "data-root"}
