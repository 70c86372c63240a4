# SPDX-License-Identifier: Apache-2.0
"""Metrics on the way: loss and accuracy by rounds, bytes and gradient steps; recovery by rounds."""

from __future__ import annotations

from typing import Any

import pandas as pd
from matplotlib.ticker import MaxNLocator
from pandas import DataFrame

from fedfusion_flwr.experiments.figures.style import (
    Look,
    Part,
    Picture,
    Section,
    canvas,
    in_words,
    legend_above,
    looks,
    plain_log,
)
from fedfusion_flwr.experiments.results import RECOVERY, Results, Setting

_UNITS = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1.0, "bytes"))


def curves(rounds: DataFrame, metric: str) -> DataFrame:
    """A metric of every strategy by round, over the runs of several seeds.

    Runs may end at different rounds: every round's numbers are of the runs that reached it.

    Returns
    -------
    DataFrame
        ``strategy``, ``round``; ``mean``, ``least`` and ``greatest`` over ``seeds`` runs; mean
        ``bytes`` sent and received and ``client-steps`` so far. Empty if no run has the metric.
    """
    order = rounds["strategy"].unique()
    by = rounds.dropna(subset=metric).groupby(["strategy", "round"])
    table = by[metric].agg(mean="mean", least="min", greatest="max", seeds="count")
    table = table.join(by[["bytes", "steps"]].mean().rename(columns={"steps": "client-steps"}))
    table = table.reset_index().astype({"round": int})
    number = table["strategy"].map({strategy: i for i, strategy in enumerate(order)})
    return table.iloc[number.argsort(kind="stable")].reset_index(drop=True)


def curves_section(results: Results) -> Section:
    """Two pictures of every setting."""
    section = Section(
        "curves",
        "Loss and accuracy on the way",
        "How fast each strategy gets better, against what it costs: rounds, bytes on the network, "
        "gradient steps of all clients together. Measured on the server's test set with the served "
        "model.",
    )
    for setting, runs in results.compared.items():
        part, rounds = Part(str(setting)), results.rounds_of(runs)
        for metric, name in (("global-accuracy", "accuracy"), ("global-loss", "loss")):
            found = curves(rounds, metric)
            if found.empty:
                section.missing.append(f"{setting}: no round has {metric}.")
            else:
                part.pictures.append(_picture(setting, found, name))
        section.parts.append(part)
    return section


def _picture(setting: Setting, found: DataFrame, name: str) -> Picture:
    unit, unit_name = _unit(found["bytes"].max())
    axes_of = {
        "round": (1.0, "round"),
        "bytes": (unit, f"{unit_name} sent and received so far"),
        "client-steps": (1.0, "gradient steps of all clients"),
    }
    figure, axes = canvas(7.6, 3, sharey=True)
    styles = looks(found["strategy"])
    for ax, (column, (size, label)) in zip(axes[:, 0], axes_of.items(), strict=True):
        for strategy, curve in found.groupby("strategy", sort=False):
            _draw(ax, str(strategy), styles[strategy], curve[column] / size, curve)
        ax.set_xlabel(label)
        ax.set_ylabel(f"test {name}")
        if name == "loss":
            plain_log(ax, "y")
    axes[0, 0].xaxis.set_major_locator(MaxNLocator(integer=True))
    if len(styles) > 1:
        legend_above(figure, axes[0, 0])
    most = found["seeds"].max()
    ends = found.groupby("strategy", sort=False)["mean"].last()
    best = in_words(ends.sort_values(ascending=name != "accuracy", kind="stable").items())
    band = f"Lines: mean of {most} seeds; bands: least to greatest seed. " if most > 1 else ""
    columns = {column: f"{name}-{column}" for column in ("mean", "least", "greatest")}
    return Picture(
        f"{name}-{setting.slug}",
        f"Test {name}: {setting}",
        f"{band}The same runs three times, against rounds, network traffic and local work. "
        f"In the last round, best first: {best}.",
        f"Line charts of test {name} by round, traffic and gradient steps. Last round, best first: "
        f"{best}.",
        figure,
        found.rename(columns=columns),
    )


def recovery_picture(results: Results, setting: Setting, runs: DataFrame) -> Picture | None:
    """How well strategies find the planted groups, by round; None if no run has a score."""
    rounds = results.rounds_of(runs)
    found = {metric: of for metric in RECOVERY if not (of := curves(rounds, metric)).empty}
    if not found:
        return None
    names = {metric: metric.replace("-", " ").replace("rand", "Rand") for metric in RECOVERY}
    figure, axes = canvas(0.5 + 2.1 * len(found), len(found), sharex=True)
    styles = looks(strategy for of in found.values() for strategy in of["strategy"])
    for ax, (metric, of) in zip(axes[:, 0], found.items(), strict=True):
        for strategy, curve in of.groupby("strategy", sort=False):
            _draw(ax, str(strategy), styles[strategy], curve["round"], curve)
        ax.set_ylabel(names[metric])
        ax.axhline(1, color="black", linewidth=0.8, linestyle=":")
    axes[-1, 0].set_xlabel("round")
    axes[-1, 0].xaxis.get_major_locator().set_params(integer=True)
    legend_above(figure, axes[0, 0])
    first, of = next(iter(found.items()))
    last = in_words(of.groupby("strategy", sort=False)["mean"].last().items(), 2)
    numbers = pd.concat([table.assign(metric=metric) for metric, table in found.items()])
    return Picture(
        f"recovery-{setting.slug}",
        f"Recovery of the planted groups: {setting}",
        "How well each strategy's groups of clients agree with the planted ones; 1 is full "
        "agreement. For the adjusted Rand index 0 is what chance gives; mutual information is "
        "above 0 by chance, the more so the more groups there are. Last round, "
        f"{names[first]}: {last}.",
        f"Line charts of recovery scores by round. Last round: {last}.",
        figure,
        numbers[["metric", "strategy", "round", "mean", "least", "greatest", "seeds"]],
    )


def _draw(ax: Any, strategy: str, style: Look, x: Any, curve: DataFrame) -> None:
    """A strategy's mean as a line over x, and its seeds as a band."""
    width, zorder = (2.2, 3) if strategy == "fedfusion" else (1.4, 2)
    ax.plot(
        x, curve["mean"], linewidth=width, label=strategy, zorder=zorder, **style.curve(len(x), 6)
    )
    if curve["seeds"].max() > 1:
        low, high = curve["least"], curve["greatest"]
        ax.fill_between(x, low, high, color=style.color, alpha=0.13, linewidth=0)


def _unit(largest: float) -> tuple[float, str]:
    return next(((size, name) for size, name in _UNITS if largest >= size), (1.0, "bytes"))
