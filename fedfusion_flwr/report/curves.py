# SPDX-License-Identifier: Apache-2.0
"""Loss and accuracy against rounds, bytes and the clients' gradient steps."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from matplotlib.ticker import MaxNLocator

from fedfusion_flwr.report.evidence import Cell, Evidence, Setting, by_strategy
from fedfusion_flwr.report.pictures import (
    Look,
    Numbers,
    Part,
    Picture,
    Section,
    canvas,
    in_words,
    legend_above,
    looks,
    plain_log,
)

_UNITS = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1.0, "bytes"))


class Curve(NamedTuple):
    """One strategy's metric by round: mean, least and greatest over ``seeds`` runs, each (R,).

    ``num_bytes`` are those sent and received so far, ``steps`` the clients' gradient steps so far;
    both are means over the runs.
    """

    rounds: np.ndarray
    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray
    seeds: np.ndarray
    num_bytes: np.ndarray
    steps: np.ndarray


def curve(cells: list[Cell], metric: str) -> Curve | None:
    """A metric over the runs of several seeds; None where no run has it.

    Runs may end at different rounds: every round's numbers are of the runs that got there.
    """
    rounds = sorted({int(row["round"]) for cell in cells for row in cell.metrics})
    column = {number: i for i, number in enumerate(rounds)}
    values, num_bytes, steps = np.full((3, len(cells), len(rounds)), np.nan)
    for k, cell in enumerate(cells):
        at = [column[int(row["round"])] for row in cell.metrics]
        values[k, at] = cell.series(metric)
        num_bytes[k, at] = cell.total("bytes-down", "bytes-up")
        steps[k, at] = cell.total("client-steps")
    told = ~np.isnan(values)
    kept = told.any(0)
    if not kept.any():
        return None
    values, told = values[:, kept], told[:, kept]
    costs = [np.nanmean(np.where(told, cost[:, kept], np.nan), 0) for cost in (num_bytes, steps)]
    return Curve(
        np.array(rounds)[kept],
        np.nanmean(values, 0),
        np.nanmin(values, 0),
        np.nanmax(values, 0),
        told.sum(0),
        *costs,
    )


def curves_section(evidence: Evidence) -> Section:
    """Two pictures of every setting."""
    section = Section(
        "curves",
        "Loss and accuracy on the way",
        "How fast each strategy gets better, against what it costs: rounds, bytes on the network, "
        "gradient steps of all clients together. Measured on the server's test set with the served "
        "model.",
    )
    for setting, cells in evidence.compared.items():
        part = Part(str(setting))
        for metric, name in (("global-accuracy", "accuracy"), ("global-loss", "loss")):
            drawn = _picture(setting, cells, metric, name)
            if drawn is None:
                section.missing.append(f"{setting}: no round has {metric}.")
            else:
                part.pictures.append(drawn)
        section.parts.append(part)
    return section


def _picture(setting: Setting, cells: list[Cell], metric: str, name: str) -> Picture | None:
    found = {s: curve(runs, metric) for s, runs in by_strategy(cells).items()}
    curves = {s: c for s, c in found.items() if c is not None}
    if not curves:
        return None
    unit, unit_name = _unit(max(c.num_bytes[-1] for c in curves.values()))
    figure, axes = canvas(7.6, 3, sharey=True)
    styles = looks(curves)
    for strategy, c in curves.items():
        for ax, x in zip(axes[:, 0], (c.rounds, c.num_bytes / unit, c.steps), strict=True):
            draw_curve(ax, strategy, styles[strategy], x, c)
    labels = ("round", f"{unit_name} sent and received so far", "gradient steps of all clients")
    for ax, label in zip(axes[:, 0], labels, strict=True):
        ax.set_xlabel(label)
        ax.set_ylabel(f"test {name}")
        if name == "loss":
            plain_log(ax, "y")
    axes[0, 0].xaxis.set_major_locator(MaxNLocator(integer=True))
    if len(curves) > 1:
        legend_above(figure, axes[0, 0])
    most = max(int(c.seeds.max()) for c in curves.values())
    ends = sorted(
        ((s, float(c.mean[-1])) for s, c in curves.items()),
        key=lambda pair: pair[1],
        reverse=name == "accuracy",
    )
    band = f"Lines: mean of {most} seeds; bands: least to greatest seed. " if most > 1 else ""
    return Picture(
        f"{name}-{setting.slug}",
        f"Test {name}: {setting}",
        f"{band}The same runs three times, against rounds, network traffic and local work. "
        f"In the last round, best first: {in_words(ends)}.",
        f"Line charts of test {name} by round, traffic and gradient steps. Last round, best first: "
        f"{in_words(ends)}.",
        figure,
        _numbers(curves, name),
    )


def draw_curve(ax: Any, strategy: str, style: Look, x: np.ndarray, c: Curve) -> None:
    """A strategy's mean as a line over x (R,), and its seeds as a band."""
    fusion = strategy == "fedfusion"
    ax.plot(
        x,
        c.mean,
        color=style.color,
        linestyle=style.line,
        marker=style.marker,
        markersize=4,
        markevery=max(1, len(x) // 6),
        linewidth=2.2 if fusion else 1.4,
        label=strategy,
        zorder=3 if fusion else 2,
    )
    if c.seeds.max() > 1:
        ax.fill_between(x, c.low, c.high, color=style.color, alpha=0.13, linewidth=0)


def _numbers(curves: dict[str, Curve], name: str) -> Numbers:
    return [
        {
            "strategy": strategy,
            "round": int(c.rounds[i]),
            f"{name}-mean": float(c.mean[i]),
            f"{name}-least": float(c.low[i]),
            f"{name}-greatest": float(c.high[i]),
            "seeds": int(c.seeds[i]),
            "bytes": float(c.num_bytes[i]),
            "client-steps": float(c.steps[i]),
        }
        for strategy, c in curves.items()
        for i in range(len(c.rounds))
    ]


def _unit(largest: float) -> tuple[float, str]:
    return next(((size, name) for size, name in _UNITS if largest >= size), (1.0, "bytes"))
