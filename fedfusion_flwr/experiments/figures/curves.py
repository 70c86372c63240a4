# SPDX-License-Identifier: Apache-2.0
"""Metrics on the way: loss and accuracy by rounds, bytes and gradient steps; recovery by rounds."""

from __future__ import annotations

import pandas as pd
from pandas import DataFrame

from fedfusion_flwr.experiments.figures import draw
from fedfusion_flwr.experiments.results import RECOVERY, Results, Setting

_UNITS = {"TB": 1e12, "GB": 1e9, "MB": 1e6, "kB": 1e3, "bytes": 1.0}


def curves(rounds: DataFrame, metric: str) -> DataFrame:
    """A metric of every strategy by round, over the runs of several seeds.

    Runs may end at different rounds: every round's numbers are of the runs that reached it.

    Returns
    -------
    DataFrame
        ``strategy``, ``round``; ``mean``, ``least`` and ``greatest`` over ``seeds`` runs; mean
        ``bytes`` sent and received and ``client-steps`` so far. Empty if no run has the metric.
    """
    ordered = pd.Categorical(rounds["strategy"], rounds["strategy"].unique())
    rounds = rounds.assign(strategy=ordered).dropna(subset=metric)
    by = rounds.groupby(["strategy", "round"], observed=True)
    table = by[metric].agg(mean="mean", least="min", greatest="max", seeds="count")
    table = table.join(by[["bytes", "steps"]].mean().rename(columns={"steps": "client-steps"}))
    return table.reset_index().astype({"strategy": str, "round": int})


def curves_section(results: Results) -> draw.Section:
    """Two pictures of every setting."""
    section = draw.Section("curves")
    for setting, runs in results.compared.items():
        part, rounds = draw.Part(str(setting)), results.rounds_of(runs)
        for metric, name in (("global-accuracy", "accuracy"), ("global-loss", "loss")):
            found = curves(rounds, metric)
            if found.empty:
                section.missing.append(f"{setting}: no round has {metric}.")
            else:
                part.pictures.append(_picture(setting, found, name))
        section.parts.append(part)
    return section


def _picture(setting: Setting, found: DataFrame, name: str) -> draw.Picture:
    most_bytes = found["bytes"].max()
    unit = next((unit for unit, size in _UNITS.items() if most_bytes >= size), "bytes")
    labels = {
        "round": "round",
        "bytes": f"{unit} sent and received so far",
        "client-steps": "gradient steps of all clients",
    }
    scaled = found.assign(bytes=found["bytes"] / _UNITS[unit])
    figure, axes = draw.canvas(7.6, 3, sharey=True)
    styles = draw.looks(found["strategy"])
    for ax, (column, label) in zip(axes[:, 0], labels.items(), strict=True):
        draw.lines(ax, scaled, "strategy", column, "mean", styles, marks=6)
        ax.set(xlabel=label, ylabel=f"test {name}")
        if name == "loss":
            draw.plain_log(ax, "y")
    if len(styles) > 1:
        draw.legend_above(figure, axes[0, 0])
    most = found["seeds"].max()
    ends = found.groupby("strategy", sort=False)["mean"].last()
    best = draw.in_words(ends.sort_values(ascending=name != "accuracy", kind="stable").items())
    band = f"Lines: mean of {most} seeds; bands: least to greatest seed. " if most > 1 else ""
    columns = {column: f"{name}-{column}" for column in ("mean", "least", "greatest")}
    return draw.Picture(
        f"{name}-{setting.slug}",
        f"Test {name}: {setting}",
        f"{band}The same runs three times, against rounds, network traffic and local work. "
        f"In the last round, best first: {best}.",
        f"Line charts of test {name} by round, traffic and gradient steps. Last round, best first: "
        f"{best}.",
        figure,
        found.rename(columns=columns),
    )


def recovery_picture(results: Results, setting: Setting, runs: DataFrame) -> draw.Picture | None:
    """How well strategies find the planted groups, by round; None if no run has a score."""
    rounds = results.rounds_of(runs)
    found = {metric: of for metric in RECOVERY if not (of := curves(rounds, metric)).empty}
    if not found:
        return None
    numbers = pd.concat([table.assign(metric=metric) for metric, table in found.items()])
    names = {metric: metric.replace("-", " ").replace("rand", "Rand") for metric in RECOVERY}
    figure, axes = draw.canvas(0.5 + 2.1 * len(found), len(found), sharex=True)
    styles = draw.looks(numbers["strategy"])
    for ax, (metric, of) in zip(axes[:, 0], found.items(), strict=True):
        draw.lines(ax, of, "strategy", "round", "mean", styles, marks=6)
        ax.set(ylabel=names[metric], xlabel="round" if ax is axes[-1, 0] else "")
        ax.axhline(1, color="black", linewidth=0.8, linestyle=":")
    draw.legend_above(figure, axes[0, 0])
    first, of = next(iter(found.items()))
    last = draw.in_words(of.groupby("strategy", sort=False)["mean"].last().items(), 2)
    return draw.Picture(
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
