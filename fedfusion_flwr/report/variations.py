# SPDX-License-Identifier: Apache-2.0
"""Runs that differ in their config: what one key does, and what each part of the method earns."""

from __future__ import annotations

import statistics
import textwrap
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from fedfusion_flwr.report.accuracy import MEASURES, last_values
from fedfusion_flwr.report.evidence import Cell, Evidence, by_strategy, slug
from fedfusion_flwr.report.pictures import (
    Numbers,
    Part,
    Picture,
    Section,
    canvas,
    dots,
    in_words,
    legend_above,
    looks,
    name_rows,
)

Sweep = dict[str, dict[Any, list[Cell]]]
"""Cells of the values of one key: by the app's strategy, and by value."""

_ACCURACY = MEASURES["global"]
_NO_SETTINGS = ("strategy", "seed", "output-dir", "data-root")
_LABEL = 22
"""Letters in a line of a variant's name."""
_LOG_FROM = 8.0
"""Values whose greatest is so many times the least stand on a logarithmic axis."""


def usual_config(cells: Iterable[Cell]) -> dict[str, Any]:
    """Each key's most frequent value; of equally frequent ones the first.

    Where cells differ from one config in one key each, and keys are at least three, this is that
    config.
    """
    columns: dict[str, Counter[Any]] = {}
    for cell in cells:
        for key, value in cell.config.items():
            columns.setdefault(key, Counter())[value] += 1
    return {key: counts.most_common(1)[0][0] for key, counts in columns.items()}


def differences(cell: Cell, usual: Mapping[str, Any]) -> dict[str, Any]:
    """The cell's values where they are not the usual ones, by key.

    Rounds go with another key, to keep the gradient steps, and count only by themselves.
    """
    changed = {
        key: value
        for key, value in cell.config.items()
        if key not in _NO_SETTINGS and value != usual.get(key)
    }
    if len(changed) > 1:
        changed.pop("num-server-rounds", None)
    return changed


def hyper_parameters_section(evidence: Evidence) -> Section:
    """A picture of every key that is varied, for each data set, model and kind of partition."""
    section = Section(
        "hyper-parameters",
        "Hyper-parameters",
        "Accuracy in the last round when one key of the config is varied and all others stay.",
    )
    cells = evidence.group("hyper-parameters")
    families: dict[tuple[str, str, str], list[Cell]] = {}
    for cell in cells:
        family = (cell.setting.dataset, cell.setting.model, cell.config["partition"])
        families.setdefault(family, []).append(cell)
    for family, members in families.items():
        sweeps, left_out = _sweeps(members)
        section.missing += left_out
        pictures = [_sweep_picture(family, key, by) for key, by in sweeps.items()]
        if pictures:
            section.parts.append(Part(", ".join(family), pictures))
    if not cells:
        section.missing.append("No cells of a group hyper-parameters.")
    return section


def _sweeps(cells: list[Cell]) -> tuple[dict[str, Sweep], list[str]]:
    """The sweep of every key that is varied; and sentences on cells that vary several at once.

    A strategy that does not vary a key has its usual cells under the usual value.
    """
    found: dict[str, Sweep] = {}
    usual_cells: dict[str, tuple[dict[str, Any], list[Cell]]] = {}
    left_out: list[str] = []
    algorithms: dict[str, list[Cell]] = {}
    for cell in cells:
        algorithms.setdefault(cell.algorithm, []).append(cell)
    for strategy, members in algorithms.items():
        usual = usual_config(members)
        usual_cells[strategy] = (usual, [])
        for cell in members:
            changed = differences(cell, usual)
            if not changed:
                usual_cells[strategy][1].append(cell)
            elif len(changed) == 1:
                ((key, value),) = changed.items()
                sweep = found.setdefault(key, {}).setdefault(strategy, {})
                sweep.setdefault(value, []).append(cell)
            else:
                keys = ", ".join(changed)
                left_out.append(f"Cell {cell.name} varies {keys} at once and is in no picture.")
    for key, by in found.items():
        for strategy, (usual, members) in usual_cells.items():
            if members:
                by.setdefault(strategy, {})[usual[key]] = members
    return found, left_out


def _sweep_picture(family: tuple[str, str, str], key: str, by: Sweep) -> Picture:
    styles = looks(by)
    values = sorted({value for sweep in by.values() for value in sweep})
    numeric = all(isinstance(v, int | float) and not isinstance(v, bool) for v in values)
    place = {v: float(v) if numeric else float(i) for i, v in enumerate(values)}
    figure, axes = canvas(3.0)
    ax = axes[0, 0]
    numbers: Numbers = []
    best: list[tuple[str, float]] = []
    for strategy, sweep in by.items():
        told = {v: a for v in values if v in sweep and (a := last_values(sweep[v], _ACCURACY))}
        if not told:
            continue
        style = styles[strategy]
        means = [statistics.mean(a) for a in told.values()]
        x = [place[v] for v in told]
        if len(told) == 1:
            ax.axhline(means[0], color=style.color, linestyle=style.line, linewidth=1.2)
        ax.errorbar(
            x,
            means,
            [
                [m - min(a) for m, a in zip(means, told.values(), strict=True)],
                [max(a) - m for m, a in zip(means, told.values(), strict=True)],
            ],
            color=style.color,
            linestyle=style.line,
            marker=style.marker,
            markersize=6,
            capsize=3,
            label=strategy,
        )
        best.append((strategy, max(means) - min(means)))
        numbers += [
            {"strategy": strategy, key: value, "seed": cell.seed, "accuracy": cell.last(_ACCURACY)}
            for value in told
            for cell in sweep[value]
        ]
    if numeric and min(place.values()) > 0:
        if max(place.values()) >= _LOG_FROM * min(place.values()):
            ax.set_xscale("log")
        ax.minorticks_off()
    ax.set_xticks(list(place.values()), [f"{v:g}" if numeric else str(v) for v in values])
    ax.set_xlabel(key)
    ax.set_ylabel("accuracy in the last round")
    legend_above(figure, ax)
    named = ", ".join(family)
    return Picture(
        f"hyper-{slug(' '.join((*family, key)))}",
        f"{key}: {named}",
        f"Markers are means over seeds, bars go from the least to the greatest seed. A level line "
        f"is a strategy for which {key} was not varied. From the worst to the best value the mean "
        f"changes by: {in_words(best)}.",
        f"Line chart of accuracy by {key}. Range of the mean: {in_words(best)}.",
        figure,
        numbers,
    )


def ablation_section(evidence: Evidence) -> Section:
    """One picture for each setting and share of clients that take part."""
    section = Section(
        "ablation",
        "Ablation",
        "What each part earns: runs that differ from one config by what stands at their side.",
    )
    cells = evidence.group("ablation")
    families: dict[str, list[Cell]] = {}
    for cell in cells:
        setting, share = cell.setting, float(cell.config["fraction-train"])
        named = f"{setting.dataset}, {setting.model}, {setting.partition}"
        families.setdefault(f"{named}, {share:.0%} take part", []).append(cell)
    pictures = [_ablation_picture(title, members) for title, members in families.items()]
    if pictures:
        section.parts = [Part("What each part earns", pictures)]
    else:
        section.missing.append("No cells of a group ablation.")
    return section


def _ablation_picture(title: str, cells: list[Cell]) -> Picture:
    variants: dict[str, list[Cell]] = {}
    for label, members in by_strategy(cells).items():
        usual = usual_config(members)
        for cell in members:
            name = _variant_name(label, differences(cell, usual))
            variants.setdefault(name, []).append(cell)
    # What all others are compared with stands on top: the first strategy, nothing changed.
    first = min(variants, key=lambda name: name != cells[0].strategy)
    ordered = [first, *(name for name in variants if name != first)]
    shown = [textwrap.fill(name, _LABEL, break_on_hyphens=False) for name in ordered]
    lines = 1 + max(name.count("\n") for name in shown)
    figure, axes = canvas(0.7 + (0.2 + 0.16 * lines) * len(ordered))
    ax, styles = axes[0, 0], looks(cell.algorithm for cell in cells)
    numbers: Numbers = []
    means: list[tuple[str, float]] = []
    for row, name in enumerate(ordered):
        values = last_values(variants[name], _ACCURACY)
        numbers += [
            {"variant": name, "seed": cell.seed, "accuracy": cell.last(_ACCURACY)}
            for cell in variants[name]
        ]
        if not values:
            continue
        mean = statistics.mean(values)
        means.append((name, mean))
        algorithm = variants[name][0].algorithm
        dots(ax, row, values, styles[algorithm], hollow=algorithm != "fedfusion")
        ax.annotate(
            f"{mean:.3f}", (mean, row), (0, 6), textcoords="offset points", ha="center",
            fontsize="small",
        )  # fmt: skip
        if name == first:
            ax.axvline(mean, color="black", linestyle=":", linewidth=1)
    name_rows(ax, shown)
    ax.margins(x=0.12)
    ax.set_xlabel("accuracy in the last round")
    return Picture(
        f"ablation-{slug(title)}",
        f"Ablation: {title}",
        "Marks are means over seeds, lines go from the least to the greatest seed. The dotted line "
        f"is {first}. Filled marks are FedFusion, hollow ones other strategies, so that a gain can "
        "be attributed to what earns it.",
        f"Dot chart of accuracy by variant: {in_words(means)}.",
        figure,
        numbers,
    )


def _variant_name(strategy: str, changed: Mapping[str, Any]) -> str:
    parts = [f"{key} {value:g}" if isinstance(value, float) else f"{key} {value}"
             for key, value in changed.items()]  # fmt: skip
    return f"{strategy} + {', '.join(parts)}" if parts else strategy
