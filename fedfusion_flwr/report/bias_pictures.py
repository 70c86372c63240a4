# SPDX-License-Identifier: Apache-2.0
"""Feature bias in pictures: distributions of running statistics, and three measures."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from fedfusion_flwr.errors import FedFusionError
from fedfusion_flwr.report.bias import SettingBias, complaints, measure
from fedfusion_flwr.report.bias_rows import Bias
from fedfusion_flwr.report.bias_store import FILE, BiasRows
from fedfusion_flwr.report.evidence import Evidence
from fedfusion_flwr.report.pictures import (
    CENTRALIZED,
    Numbers,
    Part,
    Picture,
    Section,
    bars,
    canvas,
    dots,
    in_words,
    legend_above,
    looks,
    name_rows,
    plain_log,
)

PUBLISHED: dict[tuple[str, str], dict[str, float]] = {
    ("fashion-mnist", "lenet"): {
        "fedfusion": 0.034,
        "fedma": 0.081,
        "fedprox": 0.11,
        "fedavg": 0.13,
    },
    ("mnist", "lenet"): {"fedfusion": 0.021, "fedma": 0.043, "fedprox": 0.08, "fedavg": 0.09},
    ("cifar10", "resnet18"): {
        "fedfusion": 0.052,
        "fedma": 0.26,
        "fedprox": 0.53,
        "fedavg": 0.62,
    },
}
"""Divergences that the authors of FedFusion give; their conventions are not known."""


def bias_section(evidence: Evidence) -> Section:
    """Three pictures of every setting whose models were kept, or were measured once.

    What is measured is written to the suite's folder.
    """
    section = Section(
        "feature-bias",
        "Feature-distribution bias",
        "How far each strategy's global model is from centralized training in what its "
        "normalization layers see. Three measures, because the published one compares only which "
        "values occur; all are zero for the same model, and each is shown with its floor: what two "
        "centralized runs differ by that see the same batches in another order. Only runs of seeds "
        "that have a centralized model are measured.",
    )
    if evidence.is_run:
        section.missing.append(
            "A single run has no centralized model beside it; the report of a suite has."
        )
        return section
    stored = BiasRows.read(evidence.path)
    for setting, cells in evidence.compared.items():
        try:
            found, new = measure(evidence, setting, cells, stored)
        except FedFusionError as problem:
            section.missing.append(f"{setting}: {problem}.")
            continue
        try:
            stored.replace(new)
        except OSError as problem:
            # What was measured can be drawn all the same.
            section.missing.append(f"{setting}: '{FILE}' cannot be written ({problem.strerror}).")
        part = Part(str(setting), [_measures(found)])
        if found.values:
            part.pictures.append(_distributions(found))
        if max(len(layers) for row in found.rows for layers in row.distances or [[]]) > 2:
            part.pictures.append(layers_picture(found))
        section.parts.append(part)
    section.missing += complaints(evidence, stored)
    return section


def _distributions(found: SettingBias) -> Picture:
    figure, axes = canvas(5.8, 2)
    styles = looks(found.values)
    numbers: Numbers = []
    for ax, name in ((axes[0, 0], "running mean"), (axes[1, 0], "running deviation")):
        for strategy, kept in found.values.items():
            values = kept.means if name == "running mean" else kept.deviations
            shares = kept.shares
            style = styles[strategy]
            ax.step(
                values,
                shares,
                where="post",
                color=style.color,
                linestyle="-" if strategy == CENTRALIZED else style.line,
                linewidth=2.4 if strategy == CENTRALIZED else 1.3,
                marker=None if strategy == CENTRALIZED else style.marker,
                markersize=4,
                markevery=max(1, len(values) // 5),
                label=strategy,
            )
            numbers += [
                {"strategy": strategy, "statistic": name, "value": v, "share": float(s)}
                for v, s in zip(values, shares, strict=True)
            ]
        ax.set_xlabel(f"{name} of a channel")
        ax.set_ylabel("share of channels below")
    legend_above(figure, axes[0, 0])
    return Picture(
        f"bias-distributions-{found.setting.slug}",
        f"Running statistics: {found.setting}",
        "Cumulative distributions over all channels of all normalization layers, one model of each "
        "strategy (its first seed). The nearer a line is to the thick black one, the more alike "
        "are the values that occur; which channel has which value is not seen here.",
        "Cumulative distributions of running means and deviations, each strategy beside "
        "centralized training.",
        figure,
        numbers,
    )


def _measures(found: SettingBias) -> Picture:
    floor = found.rows[0]
    strategies = found.rows[1:]
    published = PUBLISHED.get((found.setting.dataset, found.setting.model), {})
    panels: tuple[tuple[str, str, Callable[[Bias], list[float]]], ...] = (
        ("divergence", "KL divergence of histograms (nats)", lambda row: row.divergence),
        ("feature-distance", "1 - CKA of features, mean over layers", Bias.mean_distances),
        ("statistics-gap", "gap of carried statistics to measured ones", lambda row: row.gaps),
    )
    figure, axes = canvas(3 * (0.65 + 0.24 * len(strategies)), 3)
    numbers: Numbers = []
    names = [row.strategy for row in strategies]
    styles = looks(names)
    for ax, (name, label, of) in zip(axes[:, 0], panels, strict=True):
        values = [of(row) for row in strategies]
        if name == "statistics-gap":
            # From a floor of thousandths to one half: no bars, which would have to start at 0.
            for y, (strategy, told) in enumerate(zip(names, values, strict=True)):
                dots(ax, y, told, styles[strategy])
            name_rows(ax, names)
        else:
            bars(ax, names, values)
        for y, told in enumerate(values):
            if not told:
                ax.text(
                    0.01,
                    y,
                    "no running statistics",
                    fontsize="small",
                    color="0.3",
                    va="center",
                    transform=ax.get_yaxis_transform(),
                    bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.0},
                )
        ax.set_xlabel(label)
        _draw_floor(ax, of(floor))
        if name == "statistics-gap":
            plain_log(ax, "x")
        if name == "divergence" and published:
            shown = [
                (published[row.strategy], y)
                for y, row in enumerate(strategies)
                if row.strategy in published
            ]
            ax.plot(*zip(*shown, strict=True), "D", color="black", markerfacecolor="white",
                    markersize=5, label="published")  # fmt: skip
        numbers += _rows(name, [floor, *strategies], [of(floor), *values])
    numbers += _rows(
        "divergence-reversed",
        found.rows,
        [row.reverse for row in found.rows],
    )
    numbers += [
        {
            "measure": "share-outside",
            "strategy": strategy,
            "run": 0,
            "value": kept.outside,
        }
        for strategy, kept in found.values.items()
    ]
    numbers += [
        {"measure": "divergence-published", "strategy": s, "run": 0, "value": value}
        for s, value in published.items()
    ]
    legend_above(figure, axes[0, 0])
    means = [(r.strategy, statistics.mean(d)) for r in strategies if (d := r.mean_distances())]
    beside = (
        " Diamonds are the figures published by FedFusion's authors, whose bins and smoothing for "
        "empty bins are not told: compare orders, not sizes."
        if published
        else ""
    )
    return Picture(
        f"bias-{found.setting.slug}",
        f"Three measures: {found.setting}",
        "Bars and marks: mean over runs; lines: least to greatest run; grey: the floor, least to "
        "greatest, of centralized runs. Top: divergence of the histogram of running means and "
        "deviations from the centralized model's, bins of 0.1 on [-2, 2), 0.01 added to each bin's "
        f"count.{beside} Middle: how differently the two models see the same test examples, 0 "
        "alike up to rotation. Bottom: how far the statistics that the model carries are from "
        "those of its own features on the test examples, from 0 to 1 (logarithmic); here the floor "
        "is that of a centralized model itself.",
        f"Bar charts of three measures by strategy. Feature distance: {in_words(means)}.",
        figure,
        numbers,
    )


def layers_picture(found: SettingBias) -> Picture:
    """The feature distance of every layer, mean over runs."""
    figure, axes = canvas(3.2)
    ax = axes[0, 0]
    styles = looks(row.strategy for row in found.rows)
    numbers: Numbers = []
    for row in found.rows:
        if not row.distances or not row.distances[0]:
            continue
        layers = np.mean(row.distances, axis=0)
        style = styles[row.strategy]
        depth = np.arange(1, len(layers) + 1)
        ax.plot(
            depth,
            layers,
            color=style.color,
            linestyle=style.line,
            marker=style.marker,
            markersize=4,
            markevery=max(1, len(layers) // 8),
            linewidth=1.4,
            label=f"{CENTRALIZED} (floor)" if row.strategy == CENTRALIZED else row.strategy,
        )
        numbers += [
            {"strategy": row.strategy, "layer": int(d), "feature-distance": float(v)}
            for d, v in zip(depth, layers, strict=True)
        ]
    ax.set_xlabel("normalization layer, as the model lists them")
    ax.set_ylabel("1 - CKA of its input")
    legend_above(figure, ax)
    return Picture(
        f"bias-layers-{found.setting.slug}",
        f"Layer by layer: {found.setting}",
        "The middle measure of the bar chart by layer, mean over runs: where in the network the "
        "models begin to see the same examples differently.",
        "Line chart of the feature distance by normalization layer, each strategy and the floor.",
        figure,
        numbers,
    )


def _draw_floor(ax: Any, values: list[float]) -> None:
    if values:
        ax.axvspan(min(values), max(values), color="0.6", alpha=0.5, label="floor", zorder=0)
        ax.axvline(statistics.mean(values), color="0.3", linestyle=":")


def _rows(name: str, rows: Sequence[Bias], values: Sequence[list[float]]) -> Numbers:
    return [
        {"measure": name, "strategy": row.strategy, "run": i, "value": value}
        for row, told in zip(rows, values, strict=True)
        for i, value in enumerate(told)
    ]
