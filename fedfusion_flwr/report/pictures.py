# SPDX-License-Identifier: Apache-2.0
"""Pictures and the numbers in them; how strategies look in all of them."""

from __future__ import annotations

import base64
import csv
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from fedfusion_flwr.config import STRATEGIES

Numbers = list[dict[str, Any]]

WIDTH = 4.8
"""Inches of every picture: its letters can still be read on a telephone's width."""
CENTRALIZED = "centralized"
_RC: Any = {
    # The same numbers give the same file, and letters stay letters.
    "svg.hashsalt": "fedfusion",
    "svg.fonttype": "none",
    "path.simplify": True,
    "font.size": 9.5,
    "hatch.linewidth": 0.6,
}


class Look(NamedTuple):
    """How one strategy is drawn; each differs from all others also without its colour."""

    color: str
    line: str | tuple[int, tuple[int, ...]]
    marker: str
    hatch: str


# Okabe & Ito's palette for the colour-blind, without its yellow, which fades on white; grey added.
_COLORS = (
    "#D55E00", "#0072B2", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#666666",
)  # fmt: skip
_LINES: tuple[str | tuple[int, tuple[int, ...]], ...] = (
    "-", (0, (5, 2)), (0, (1, 1)), (0, (5, 1, 1, 1)), (0, (8, 2, 2, 2, 2, 2)),
)  # fmt: skip
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "h", "p", "*", "d", "8")
_HATCHES = ("", "///", "...", "xxx", "\\\\\\", "+++", "ooo", "|||", "---", "//..", "\\\\..", "xx..")


def look(strategy: str) -> Look:
    """The look of a strategy, the same in every report."""
    if strategy == CENTRALIZED:
        return Look("black", (0, (2, 1)), "|", "")
    known = STRATEGIES.index(strategy) if strategy in STRATEGIES else len(STRATEGIES)
    return numbered_look(known)


def numbered_look(number: int) -> Look:
    """The look of the number-th of several things."""
    return Look(
        *(looks[number % len(looks)] for looks in (_COLORS, _LINES, _MARKERS, _HATCHES))  # type: ignore[arg-type]
    )


@dataclass(frozen=True)
class Picture:
    """A figure with its numbers and what is to be said of it.

    Attributes
    ----------
    name : str
        Of its files, without suffix.
    title, caption : str
        Above and below it; the caption says in plain words what is seen and how it was measured.
    alt : str
        What it shows, for those who cannot see it.
    figure : Figure
        Drawn, not saved.
    numbers : Numbers
        One dict a row, equal keys.
    """

    name: str
    title: str
    caption: str
    alt: str
    figure: Figure
    numbers: Numbers

    def write(self, folder: Path) -> None:
        """Write ``<name>.svg``, ``.png`` and ``.csv``."""
        with mpl.rc_context(_RC):
            self.figure.savefig(folder / f"{self.name}.svg", metadata={"Date": None})
            self.figure.savefig(folder / f"{self.name}.png", dpi=150)
        write_csv(folder / f"{self.name}.csv", self.numbers)

    def data_uri(self, folder: Path) -> str:
        """The written SVG, to stand in a page."""
        text = (folder / f"{self.name}.svg").read_bytes()
        return "data:image/svg+xml;base64," + base64.b64encode(text).decode()

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in CSS pixels."""
        width, height = self.figure.get_size_inches()
        return round(width * 96), round(height * 96)


@dataclass(frozen=True)
class Table:
    """Numbers that the page shows as they are: the first column names the row."""

    name: str
    caption: str
    header: list[str]
    rows: list[list[str]]
    numbers: Numbers

    def write(self, folder: Path) -> None:
        """Write ``<name>.csv``."""
        write_csv(folder / f"{self.name}.csv", self.numbers)


@dataclass
class Part:
    """What is shown of one setting or run."""

    title: str
    pictures: list[Picture] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)


@dataclass
class Section:
    """One question of the report: what is asked, its parts, and what could not be drawn."""

    anchor: str
    title: str
    text: str
    parts: list[Part] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)


def canvas(height: float, rows: int = 1, columns: int = 1, **options: Any) -> tuple[Figure, Any]:
    """A figure of the common width, and its axes, (rows, columns)."""
    with mpl.rc_context(_RC):
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots(rows, columns, squeeze=False, **options)
    for ax in axes.flat:
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(alpha=0.25, linewidth=0.6)
        ax.set_axisbelow(True)
    return figure, axes


def legend_above(figure: Figure, ax: Axes, columns: int = 3) -> None:
    """One legend for all axes of a figure, over them."""
    handles, labels = ax.get_legend_handles_labels()
    figure.legend(
        handles,
        labels,
        loc="outside upper left",
        ncols=columns,
        frameon=False,
        fontsize="small",
        handlelength=3.2,
        columnspacing=1.2,
    )


def bars(
    ax: Axes,
    names: Sequence[str],
    values: Sequence[Sequence[float]],
    looks: Sequence[Look],
) -> None:
    """Horizontal bars of means, first on top, with lines from the least to the greatest value."""
    for position, (numbers, style) in enumerate(zip(values, looks, strict=True)):
        if not numbers:
            continue
        mean = sum(numbers) / len(numbers)
        ax.barh(
            position, mean, height=0.7, color=style.color, alpha=0.75, hatch=style.hatch,
            edgecolor="white", linewidth=0,
        )  # fmt: skip
        ax.plot([min(numbers), max(numbers)], [position] * 2, color="black", linewidth=1.5)
    ax.set_yticks(range(len(names)), names)
    ax.set_ylim(len(names) - 0.4, -0.6)
    ax.grid(axis="y", visible=False)


def write_csv(path: Path, numbers: Numbers) -> None:
    """Write rows as CSV; what is None or NaN stays empty."""
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, list(numbers[0]), lineterminator="\n")
    writer.writeheader()
    for row in numbers:
        writer.writerow({key: "" if value != value else value for key, value in row.items()})
    path.write_text(buffer.getvalue(), encoding="utf-8")


def in_words(pairs: Iterable[tuple[str, float]], digits: int = 3) -> str:
    """``a 0.912, b 0.850``: values by name, for captions and alternative texts."""
    return ", ".join(f"{name} {value:.{digits}f}" for name, value in pairs)
