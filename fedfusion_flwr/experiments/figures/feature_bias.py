# SPDX-License-Identifier: Apache-2.0
"""Feature bias in pictures: read from the rows, three measures and what they are made of."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import numpy as np
import pandas as pd
from pandas import DataFrame

from fedfusion_flwr.experiments.bias import MOST_VALUES
from fedfusion_flwr.experiments.figures import draw
from fedfusion_flwr.experiments.results import CENTRALIZED, Results, Setting, first_of
from fedfusion_flwr.experiments.rows import ResultsError, Row

PUBLISHED: dict[tuple[str, str], dict[str, float]] = {
    ("fashion-mnist", "lenet"): {"fedfusion": 0.034, "fedma": 0.081, "fedprox": 0.11,
                                 "fedavg": 0.13},
    ("mnist", "lenet"): {"fedfusion": 0.021, "fedma": 0.043, "fedprox": 0.08, "fedavg": 0.09},
    ("cifar10", "resnet18"): {"fedfusion": 0.052, "fedma": 0.26, "fedprox": 0.53, "fedavg": 0.62},
}  # fmt: skip
"""Divergences that the authors of FedFusion give; their conventions are not known."""
_PANELS = {
    "divergence": "KL divergence of histograms (nats)",
    "feature-distance": "1 - CKA of features, mean over layers",
    "statistics-gap": "gap of carried statistics to measured ones",
}


# --- from the rows --------------------------------------------------------------------------------


@dataclass(frozen=True)
class SettingBias:
    """Feature bias in one setting.

    Attributes
    ----------
    setting : Setting
        The setting.
    strategies : list[str]
        Those that were measured, in the order of the rows; without the floor.
    measures : DataFrame
        ``strategy``, ``run``, ``measure`` and ``value``. ``centralized`` is the floor: pairs of
        references of one seed that differ in the order of their batches, compared both ways.
    layers : DataFrame
        ``strategy``, ``layer`` (from 1) and ``feature-distance``, mean over runs.
    running : DataFrame
        ``strategy``, ``statistic``, ``value`` and ``share`` (of the channels below or at it), of
        the first model of each strategy that has running statistics.
    """

    setting: Setting
    strategies: list[str]
    measures: DataFrame
    layers: DataFrame
    running: DataFrame

    def of(self, measure: str, strategy: str) -> list[float]:
        """A measure of a strategy, a value a run."""
        found = self.measures
        wanted = (found["measure"] == measure) & (found["strategy"] == strategy)
        return [float(value) for value in found.loc[wanted, "value"]]


def read_bias(results: Results, setting: Setting, runs: DataFrame) -> tuple[SettingBias, list[str]]:
    """What the rows of a setting hold of feature bias, and sentences on what cannot be used.

    Runs whose seed has no reference are left out, unless that is so of all runs.

    Raises
    ------
    ResultsError
        If there is nothing to show; the sentence says why.
    """
    pooled = results.references_for(setting).assign(strategy=CENTRALIZED, cell="a reference")
    if pooled.empty:
        raise ResultsError("no centralized model of this data and model")
    complaints: list[str] = []
    floor = [tables for _, tables in _read_all(pooled, complaints)]
    known, found, foreign = set(pooled["digest"]), [], []
    for run, tables in _read_all(runs, complaints):
        if run["references"] and known.issuperset(run["references"]):
            found.append((run["seed"], tables))
        else:
            foreign.append(run["cell"])
    if foreign:
        complaints.append(
            f"{len(foreign)} runs were measured on other centralized models than those of this "
            f"folder ({first_of(foreign)})"
        )
    if not found:
        raise ResultsError("; ".join(complaints) or "no run was compared with a centralized model")
    of_seeds = [one for one in found if one[0] in set(pooled["seed"])] or found
    all_tables = zip(*floor, *(tables for _, tables in of_seeds), strict=True)
    measures, layers, running = (pd.concat(parts, ignore_index=True) for parts in all_tables)
    strategies = [name for name in measures["strategy"].unique() if name != CENTRALIZED]
    measures = measures.dropna(subset="value")
    measures = measures.assign(run=measures.groupby(["strategy", "measure"]).cumcount())
    layers = layers.groupby(["strategy", "layer"], sort=False, as_index=False).mean()
    first = running.groupby("strategy")["model"].transform("min")
    running = running[running["model"] == first]
    return SettingBias(setting, strategies, measures, layers, running), complaints


def _read_all(frame: DataFrame, complaints: list[str]) -> Iterator[tuple[Row, list[DataFrame]]]:
    """Each run with tables of its bias; sentences on those that have none that is usable."""
    for number, run in enumerate(frame.to_dict("records")):
        bias = run.get("bias")
        if not isinstance(bias, dict):
            continue
        if "missing" in bias:
            if bias["missing"] not in complaints:
                complaints.append(bias["missing"])
            continue
        try:
            distances = DataFrame(bias["feature-distances"], dtype=float)
            tables = [
                _measures(bias, distances, each=run["strategy"] == CENTRALIZED),
                distances.set_axis(range(1, distances.shape[1] + 1), axis=1).melt(
                    var_name="layer", value_name="feature-distance"
                ),
                _running(bias).assign(model=number),
            ]
            yield (
                {**run, "references": bias["references"]},
                [table.assign(strategy=run["strategy"]) for table in tables],
            )
        except (KeyError, TypeError, ValueError) as problem:
            complaints.append(f"the feature bias of {run['cell']} is damaged ({problem})")


def _measures(bias: Row, distances: DataFrame, each: bool) -> DataFrame:
    """``measure`` and ``value``: means over the references, or each pair of models both ways."""
    forward, backward = (np.array(bias[f"divergence{of}"], dtype=float) for of in ("", "-reversed"))
    pairs = DataFrame(np.stack([forward, backward], axis=1))
    values: dict[str, Any] = {
        "divergence": pairs.to_numpy().ravel() if each else [pairs[0].mean()],
        "feature-distance": distances.mean(axis=1)
        if each
        else [distances.mean(skipna=False).mean()],
        "statistics-gap": [bias.get("statistics-gap")],
        "divergence-reversed": pairs[[1, 0]].to_numpy().ravel() if each else [pairs[1].mean()],
        "share-outside": [bias.get("share-outside")],
    }
    lines = [(name, value) for name, of in values.items() for value in of]
    return DataFrame(lines, columns=["measure", "value"]).astype({"value": float})


def _running(bias: Row) -> DataFrame:
    """``statistic``, ``value`` and ``share``, that of the channels below or at the value."""
    parts = [DataFrame(columns=["statistic", "value", "share"])]
    for kind in ("mean", "deviation") if bias.get("running-means") else ():
        values = np.array(bias[f"running-{kind}s"], dtype=float)
        shares = np.arange(1, len(values) + 1) / bias["channels"]
        if bias["channels"] > MOST_VALUES:
            shares = np.linspace(0, 1, MOST_VALUES)
        parts.append(DataFrame({"statistic": f"running {kind}", "value": values, "share": shares}))
    return pd.concat(parts[1:] or parts)


# --- pictures -------------------------------------------------------------------------------------


def bias_section(results: Results) -> draw.Section:
    """Up to three pictures of every setting whose runs were compared with a reference."""
    section = draw.Section("feature-bias")
    if results.is_run:
        section.missing.append(
            "A single run has no centralized model beside it; the report of a suite has."
        )
        return section
    for setting, runs in results.compared.items():
        try:
            found, complaints = read_bias(results, setting, runs)
        except ResultsError as problem:
            section.missing.append(f"{setting}: {problem}.")
            continue
        section.missing += [f"{setting}: {complaint}." for complaint in complaints]
        part = draw.Part(str(setting), [_measures_picture(found)])
        if not found.running.empty:
            part.pictures.append(_distributions(found))
        if found.layers["layer"].max() > 2:
            part.pictures.append(layers_picture(found))
        section.parts.append(part)
    return section


def _distributions(found: SettingBias) -> draw.Picture:
    figure, axes = draw.canvas(5.8, 2)
    styles = draw.looks(found.running["strategy"])
    kinds = found.running.groupby("statistic", sort=False)
    for ax, (statistic, of) in zip(axes[:, 0], kinds, strict=True):
        draw.lines(ax, of, "strategy", "value", "share", styles, 5, drawstyle="steps-post")
        ax.set(xlabel=f"{statistic} of a channel", ylabel="share of channels below")
    draw.legend_above(figure, axes[0, 0])
    return draw.Picture(
        f"bias-distributions-{found.setting.slug}",
        f"Running statistics: {found.setting}",
        "Cumulative distributions over all channels of all normalization layers, one model of each "
        "strategy (its first seed). The nearer a line is to the thick black one, the more alike "
        "are the values that occur; which channel has which value does not show here.",
        "Cumulative distributions of running means and deviations, each strategy beside "
        "centralized training.",
        figure,
        found.running[["strategy", "statistic", "value", "share"]],
    )


def _measures_picture(found: SettingBias) -> draw.Picture:
    names, setting = found.strategies, found.setting
    published = PUBLISHED.get((setting.dataset, setting.model), {})
    figure, axes = draw.canvas(3 * (0.65 + 0.24 * len(names)), 3)
    for ax, (measure, label) in zip(axes[:, 0], _PANELS.items(), strict=True):
        values = [found.of(measure, name) for name in names]
        if measure == "statistics-gap":
            # From a floor of thousandths to one half: no bars, which would have to start at 0.
            for y, (style, of) in enumerate(zip(draw.looks(names).values(), values, strict=True)):
                draw.dots(ax, y, of, style)
            draw.name_rows(ax, names)
        else:
            draw.bars(ax, names, values)
        for y in (y for y, of in enumerate(values) if not of):
            text: Any = {"fontsize": "small", "color": "0.3", "va": "center"}
            text["bbox"] = {"facecolor": "white", "edgecolor": "none", "pad": 1.0}
            ax.text(0.01, y, "no running statistics", transform=ax.get_yaxis_transform(), **text)
        ax.set_xlabel(label)
        if floor := found.of(measure, CENTRALIZED):
            ax.axvspan(min(floor), max(floor), color="0.6", alpha=0.5, label="floor", zorder=0)
            ax.axvline(fmean(floor), color="0.3", linestyle=":")
        if measure == "statistics-gap":
            draw.plain_log(ax, "x")
        if measure == "divergence" and published:
            shown = [(published[name], y) for y, name in enumerate(names) if name in published]
            diamond = {"color": "black", "markerfacecolor": "white", "markersize": 5}
            ax.plot(*zip(*shown, strict=True), "D", label="published", **diamond)
    known = DataFrame({"strategy": published.keys(), "value": published.values()})
    known = known.assign(measure="divergence-published", run=0)
    draw.legend_above(figure, axes[0, 0])
    distances = {name: found.of("feature-distance", name) for name in names}
    means = draw.in_words((name, fmean(of)) for name, of in distances.items() if of)
    beside = (
        " Diamonds are the figures published by FedFusion's authors, who do not give their bins "
        "nor their smoothing of empty bins: compare orders, not sizes."
    )
    return draw.Picture(
        f"bias-{setting.slug}",
        f"Three measures: {setting}",
        "Bars and marks: mean over runs; lines: least to greatest run; grey: the floor, least to "
        "greatest, of centralized runs. Top: divergence of the histogram of running means and "
        "deviations from the centralized model's, bins of 0.1 on [-2, 2), 0.01 added to each bin's "
        f"count.{beside if published else ''} Middle: how differently the two models see the same "
        "test examples, 0 alike up to rotation. Bottom: how far the statistics that the model "
        "carries are from those of its own features on the test examples, from 0 to 1 "
        "(logarithmic); here the floor is that of a centralized model itself.",
        f"Bar charts of three measures by strategy. Feature distance: {means}.",
        figure,
        pd.concat([found.measures, known])[["measure", "strategy", "run", "value"]],
    )


def layers_picture(found: SettingBias) -> draw.Picture:
    """The feature distance of every layer, mean over runs."""
    floor, styles = f"{CENTRALIZED} (floor)", draw.looks([CENTRALIZED, *found.strategies])
    named = found.layers.replace({"strategy": {CENTRALIZED: floor}})
    figure, axes = draw.canvas(3.2)
    ax = axes[0, 0]
    styles[floor] = styles[CENTRALIZED]
    draw.lines(ax, named, "strategy", "layer", "feature-distance", styles)
    ax.set(xlabel="normalization layer, as the model lists them", ylabel="1 - CKA of its input")
    draw.legend_above(figure, ax)
    return draw.Picture(
        f"bias-layers-{found.setting.slug}",
        f"Layer by layer: {found.setting}",
        "The middle measure of the bar chart by layer, mean over runs: where in the network the "
        "models begin to see the same examples differently.",
        "Line chart of the feature distance by normalization layer, each strategy and the floor.",
        figure,
        found.layers,
    )
