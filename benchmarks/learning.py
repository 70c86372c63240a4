# SPDX-License-Identifier: Apache-2.0
"""Does every data set learn with its model? One federation of the app for each case.

    python benchmarks/learning.py --data-root sentiment140=/data/tweets.csv.gz   # what is missing
    python benchmarks/learning.py --table                       # prints the stored results

A case whose data set has no ``--data-root`` is left out. Every finished run is one row of
``benchmarks/results/learning.jsonl``; a run that is there already is not repeated.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.in_process import run_federation, run_in_processes
from fedfusion_flwr.experiments.rows import Row, append_row, read_rows

RESULTS = Path(__file__).parent / "results" / "learning.jsonl"
SHARED: dict[str, Any] = {"strategy": "fedfusion", "num-clients": 10, "partition": "iid"}


@dataclass(frozen=True)
class Case:
    """A run, and what it must reach.

    Attributes
    ----------
    data : str
        The ``--data-root`` that it needs.
    config : dict[str, Any]
        Keys besides ``SHARED`` and the root.
    target : float or None
        Least central accuracy of the last round; none where the case is for comparison.
    images_per_class : tuple[int, int] or None
        If given, the root is an image folder of which only so many images of each class are used:
        of train and of test.
    seeds : tuple[int, ...]
        One run each.
    """

    data: str
    config: dict[str, Any]
    target: float | None = None
    images_per_class: tuple[int, int] | None = None
    seeds: tuple[int, ...] = (0,)


_CIFAR10 = {
    "dataset": "imagefolder",
    "num-clients": 4,
    "num-server-rounds": 15,
    "precision": "bf16",
}
_TWO_CLIENTS = {**_CIFAR10, "num-clients": 2}
_SUBSET, _LARGER_SUBSET = (500, 100), (1000, 100)
CASES = {
    "bilstm-sentiment140": Case(
        "sentiment140",
        {
            "dataset": "sentiment140",
            "model": "bilstm",
            "num-server-rounds": 8,
            "batch-size": 64,
            "learning-rate": 0.1,
        },
        target=0.75,
    ),
    "lenet-fashion-mnist": Case(
        "fashion-mnist",
        {"dataset": "fashion-mnist", "model": "lenet", "num-server-rounds": 10},
        target=0.88,
    ),
    "resnet18-cifar10": Case(
        "cifar10", {"model": "resnet18", **_CIFAR10}, images_per_class=_SUBSET
    ),
    "lenet-cifar10": Case("cifar10", {"model": "lenet", **_CIFAR10}, images_per_class=_SUBSET),
    "resnet18-cifar10-larger": Case(
        "cifar10", {"model": "resnet18", **_TWO_CLIENTS}, images_per_class=_LARGER_SUBSET
    ),
    "lenet-cifar10-larger": Case(
        "cifar10", {"model": "lenet", **_TWO_CLIENTS}, images_per_class=_LARGER_SUBSET
    ),
}


def run_case(name: str, seed: int, root: Path) -> Row:
    """Run one case in this process and return its row."""
    case = CASES[name]
    config = {**SHARED, **case.config, "seed": seed}
    with ExitStack() as stack:
        if case.images_per_class:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            root = copy_subset(root, folder, case.images_per_class)
        metrics, about = run_federation({**config, "data-root": str(root)})
    accuracies = [row["global-accuracy"] for row in metrics]
    return {
        "case": name,
        "seed": seed,
        "config": config,
        "images-per-class": case.images_per_class,
        "target": case.target,
        "final-accuracy": accuracies[-1],
        "accuracy": accuracies,
        **about,
    }


def copy_subset(root: Path, folder: Path, counts: tuple[int, int]) -> Path:
    """Copy the first images by name of each class into ``folder``: so many of train and of test."""
    for kind in sorted(root.glob("*/*/")):
        count = counts[kind.parent.name == "test"]
        target = folder / kind.relative_to(root)
        target.mkdir(parents=True)
        for image in sorted(kind.iterdir())[:count]:
            shutil.copyfile(image, target / image.name)
    return folder


def run_missing(roots: dict[str, Path], workers: int) -> None:
    """Run every case that has a root and no row yet, each in a process of its own."""
    done = {(row["case"], row["seed"]) for row in read_rows(RESULTS)}
    cells = [(name, seed) for name, case in CASES.items() for seed in case.seeds]
    missing = [cell for cell in cells if cell not in done]
    for name, _ in missing:
        if CASES[name].data not in roots:
            print(f"left out | {name} | needs --data-root {CASES[name].data}=PATH")
    options = [f"--data-root={name}={path}" for name, path in roots.items()]
    ready = [cell for cell in missing if CASES[cell[0]].data in roots]
    run_in_processes(ready, options, workers)


def table() -> str:
    """Markdown: what each case reached."""
    lines = [
        "| case | clients | rounds | seed | central accuracy | target | minutes |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in read_rows(RESULTS):
        config = row["config"]
        lines.append(
            f"| {row['case']} | {config['num-clients']} | {config['num-server-rounds']} "
            f"| {row['seed']} | {row['final-accuracy']:.3f} | {row['target'] or ''} "
            f"| {row['seconds'] / 60:.1f} |"
        )
    return "\n".join(lines)


def _root(argument: str) -> tuple[str, Path]:
    name, equals, path = argument.partition("=")
    known = sorted({case.data for case in CASES.values()})
    if not equals or name not in known:
        raise argparse.ArgumentTypeError(f"{argument!r} is not NAME=PATH, NAME one of {known}")
    return name, Path(path).resolve()


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--table", action="store_true", help="only print the stored results")
    parser.add_argument("--workers", type=int, default=1, help="processes side by side")
    parser.add_argument("--data-root", type=_root, action="append", default=[], metavar="NAME=PATH")
    parser.add_argument("--cell", nargs=2, metavar=("CASE", "SEED"))
    arguments = parser.parse_args()
    roots = dict(arguments.data_root)
    if arguments.cell:
        name, seed = arguments.cell
        append_row(RESULTS, run_case(name, int(seed), roots[CASES[name].data]))
        return
    if not arguments.table:
        run_missing(roots, arguments.workers)
    print(table())


if __name__ == "__main__":
    main()
