# SPDX-License-Identifier: Apache-2.0
"""Show a partition without training: ``python -m fedfusion_flwr.data.partition 'key=value'``."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fedfusion_flwr.config import ConfigError, RunConfig
from fedfusion_flwr.data.local import partition_for
from fedfusion_flwr.data.sources import data_for
from fedfusion_flwr.errors import FedFusionError
from fedfusion_flwr.overrides import parse_overrides

_FIGURES = (".svg", ".png")
_MOST_COLUMNS = 20
"""With more classes the table only says how many a client has."""
_LONGEST_NAME = 10


@dataclass(frozen=True)
class PartitionOverview:
    """What each client gets from a run config's partition.

    ``counts`` (K, C) are the training examples of each client and class, ``available`` (C,) those
    of each class before they are divided, and ``components`` (K,) the main planted ones, if any.
    """

    config: RunConfig
    counts: np.ndarray
    available: np.ndarray
    classes: tuple[str, ...]
    components: np.ndarray | None = None

    @classmethod
    def of(cls, config: RunConfig) -> PartitionOverview:
        """Load the data and divide it, just as a run would.

        Raises
        ------
        FedFusionError
            If the data is missing or cannot be divided that way.
        """
        data, cut = data_for(config), partition_for(config)
        labels, num_classes = data.y_train.numpy(), data.num_classes
        counted = [np.bincount(labels[part], minlength=num_classes) for part in cut.indices]
        available = np.bincount(labels, minlength=num_classes)
        names = data.classes or tuple(map(str, range(num_classes)))
        return cls(config, np.stack(counted), available, names, cut.main_components)

    @property
    def sizes(self) -> np.ndarray:
        """Training examples of each client, (K,)."""
        return np.asarray(self.counts.sum(1))

    @property
    def classes_held(self) -> np.ndarray:
        """Number of classes that each client has, (K,)."""
        return np.asarray((self.counts > 0).sum(1))

    @property
    def label_skew(self) -> float:
        """Mean total variation distance of a client's labels from those of all the data, below 1.

        0 if every client has the classes in the same shares as the whole.
        """
        shares = self.counts / self.counts.sum(1, keepdims=True)
        whole = self.available / self.available.sum()
        return float(np.abs(shares - whole).sum(1).mean() / 2)

    def to_json(self) -> dict[str, Any]:
        """The numbers, for `json.dump`."""
        rows: list[dict[str, Any]] = []
        for k, counts in enumerate(self.counts):
            rows.append({"client": k, "examples": int(counts.sum()), "counts": counts.tolist()})
            if self.components is not None:
                rows[k]["component"] = int(self.components[k])
        return {
            "config": self.config.to_run_config(),
            "classes": list(self.classes),
            "examples": _spread(self.sizes),
            "classes-per-client": _spread(self.classes_held),
            "label-skew": self.label_skew,
            "clients": rows,
        }

    def table(self) -> str:
        """Clients, their examples of each class, and a summary, as plain text."""
        columns = [("client", np.arange(len(self.counts))), ("examples", self.sizes)]
        if self.components is not None:
            columns.append(("component", self.components))
        columns.append(("classes", self.classes_held))
        legend = []
        if len(self.classes) <= _MOST_COLUMNS:
            names = self.classes
            if max(map(len, names)) > _LONGEST_NAME:
                numbered = [f"{n} {name}" for n, name in enumerate(names)]
                legend = ["", f"classes: {', '.join(numbered)}"]
                names = tuple(map(str, range(len(names))))
            columns += zip(names, self.counts.T, strict=True)
        cells = [[name, *map(str, column)] for name, column in columns]
        padded = [[cell.rjust(max(map(len, column))) for cell in column] for column in cells]
        lines = map("  ".join, zip(*padded, strict=True))
        return "\n".join([*lines, *legend, "", *self._summary()])

    def draw(self, path: Path) -> None:
        """Write a figure, .svg or .png: sizes above, classes by clients below."""
        # Here and not above: only drawing needs it.
        import matplotlib as mpl
        from matplotlib.figure import Figure

        num_clients, num_classes = self.counts.shape
        width = min(max(6.0, 0.16 * num_clients + 2), 16.0)
        figure = Figure(figsize=(width, min(3.2 + 0.22 * num_classes, 12)), layout="constrained")
        upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[1, 2])
        upper.bar(range(num_clients), self.sizes, color="0.35", width=0.85)
        upper.set_ylabel("examples")
        upper.set_title(self._summary()[0].replace(": ", "\n"), fontsize="medium", loc="left")
        upper.spines[["top", "right"]].set_visible(False)
        # A scale of lightness serves the colour-blind too; white is a class that a client lacks.
        shares = np.ma.masked_equal(self.counts.T / self.sizes, 0)
        scale = {"cmap": "YlGnBu", "vmin": 0, "vmax": 1}
        image = lower.imshow(shares, aspect="auto", interpolation="nearest", **scale)
        if num_classes <= _MOST_COLUMNS:
            lower.set_yticks(range(num_classes), self.classes)
        lower.xaxis.get_major_locator().set_params(integer=True)
        lower.set_xlabel("client")
        lower.set_ylabel("class")
        figure.colorbar(image, ax=lower, label="share of the client's examples")
        # Without dates and random ids: the same numbers give the same file.
        with mpl.rc_context({"svg.hashsalt": "fedfusion", "svg.fonttype": "none"}):
            date = {"Date": None} if path.suffix.lower() == ".svg" else {}
            figure.savefig(path, dpi=150, metadata=date)

    def _summary(self) -> list[str]:
        config, examples, available = self.config, self.sizes.sum(), self.available.sum()
        return [
            f"{config.partition} partition of {config.dataset}, seed {config.seed}: "
            f"{len(self.counts)} clients, {examples} of {available} training examples",
            f"examples per client: {_in_words(self.sizes)}",
            f"classes per client: {_in_words(self.classes_held)}",
            f"label skew: {self.label_skew:.3f} (mean total variation distance of a client's "
            "labels from all labels; 0 is none)",
        ]


def _spread(values: np.ndarray) -> dict[str, float]:
    return {name: float(getattr(np, name)(values)) for name in ("min", "median", "max")}


def _in_words(values: np.ndarray) -> str:
    return ", ".join(f"{name} {value:g}" for name, value in _spread(values).items())


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table and write what is asked for; 2 and one sentence if something is wrong."""
    parser = argparse.ArgumentParser(
        prog="python -m fedfusion_flwr.data.partition",
        description="Show how classes and sizes spread over the clients, without training.",
    )
    parser.add_argument(
        "config",
        nargs="*",
        help="run-config keys, as for flwr run --run-config: 'partition=\"dirichlet\" seed=1'",
    )
    parser.add_argument("--output", type=Path, help="figure to write, .svg or .png")
    parser.add_argument("--json", type=Path, help="file to write the numbers to")
    options = parser.parse_args(arguments)
    figure, numbers = options.output, options.json
    try:
        config = RunConfig.from_run_config(parse_overrides(options.config))
        if figure is not None and figure.suffix.lower() not in _FIGURES:
            raise ConfigError(f"--output {figure} must end in {' or '.join(_FIGURES)}")
        overview = PartitionOverview.of(config)
        print(overview.table())
        if figure is not None:
            overview.draw(figure)
        if numbers is not None:
            numbers.write_text(json.dumps(overview.to_json(), indent=2) + "\n", encoding="utf-8")
    except (FedFusionError, OSError, ValueError) as problem:
        print(f"error: {problem}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
