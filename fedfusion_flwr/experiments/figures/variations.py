# SPDX-License-Identifier: Apache-2.0
"""Runs that differ in their config: what one key does, and what each part of the method earns."""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import pandas as pd
from pandas import DataFrame, Series

from fedfusion_flwr.experiments.figures.style import (
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
from fedfusion_flwr.experiments.results import Results, slug

_ACCURACY = "global-accuracy"
_NO_SETTINGS = ("strategy", "seed", "output-dir", "data-root")
_LABEL = 22
"""Letters in a line of a variant's name."""
_LOG_FROM = 8.0
"""A logarithmic axis if the greatest value is this many times the least."""


def usual_config(configs: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Each key's most frequent value; the first of equally frequent ones.

    If configs differ from one in one key each, and at least three keys are varied, this is it.
    """
    columns: dict[str, Counter[Any]] = {}
    for config in configs:
        for key, value in config.items():
            columns.setdefault(key, Counter())[value] += 1
    return {key: counts.most_common(1)[0][0] for key, counts in columns.items()}


def differences(config: Mapping[str, Any], usual: Mapping[str, Any]) -> dict[str, Any]:
    """The values that are not the usual ones, by key.

    Rounds may go with another key, to keep the gradient steps, and count only by themselves.
    """
    changed = {
        key: value
        for key, value in config.items()
        if key not in _NO_SETTINGS and value != usual.get(key)
    }
    if len(changed) > 1:
        changed.pop("num-server-rounds", None)
    return changed


def hyper_parameters_section(results: Results) -> Section:
    """A picture of every key that is varied, for each data set, model and kind of partition."""
    section = Section(
        "hyper-parameters",
        "Hyper-parameters",
        "Accuracy in the last round when one key of the config is varied and all others stay.",
    )
    runs = results.runs[results.runs["group"] == "hyper-parameters"]
    if runs.empty:
        section.missing.append("No cells of a group hyper-parameters.")
        return section
    kinds = runs["config"].map(lambda config: config["partition"])
    for family, members in runs.groupby(["dataset", "model", kinds], sort=False):
        sweeps, left_out = _sweeps(members)
        section.missing += left_out
        pictures = [_sweep_picture(family, key, of) for key, of in sweeps.items()]
        if pictures:
            section.parts.append(Part(", ".join(family), pictures))
    return section


def _sweeps(runs: DataFrame) -> tuple[dict[str, DataFrame], list[str]]:
    """The runs by key that they vary, and sentences on runs that vary several at once.

    Tables have ``strategy`` (the app's), ``value``, ``seed`` and ``accuracy``. A strategy that
    does not vary a key has its usual runs under the usual value.
    """
    usual: dict[str, dict[str, Any]] = {}
    lines, left_out = [], []
    for strategy, of in runs.groupby("algorithm", sort=False):
        usual[strategy] = usual_config(of["config"])
        for run in of.to_dict("records"):
            changed = differences(run["config"], usual[strategy])
            if len(changed) > 1:
                keys = ", ".join(changed)
                left_out.append(f"Cell {run['cell']} varies {keys} at once and is in no picture.")
                continue
            key, value = next(iter(changed.items()), (None, None))
            lines.append((strategy, key, value, run["seed"], run[_ACCURACY]))
    names = ["strategy", "key", "value", "seed", "accuracy"]
    table = DataFrame(lines, columns=names, dtype=object)
    unchanged = table[table["key"].isna()]
    sweeps = {}
    for key, varied in table.groupby("key", sort=False):
        values = Series([usual[s][key] for s in unchanged["strategy"]], unchanged.index, object)
        sweeps[str(key)] = pd.concat([varied, unchanged.assign(value=values)]).drop(columns="key")
    return sweeps, left_out


def _sweep_picture(family: tuple[str, str, str], key: str, sweep: DataFrame) -> Picture:
    sweep = sweep.dropna(subset="accuracy")
    values = sorted(set(sweep["value"]))
    numeric = all(isinstance(v, int | float) and not isinstance(v, bool) for v in values)
    place = {v: float(v) if numeric else float(i) for i, v in enumerate(values)}
    figure, axes = canvas(3.0)
    ax, styles = axes[0, 0], looks(sweep["strategy"])
    ordered, changes = [], []
    for strategy, of in sweep.groupby("strategy", sort=False):
        of = of.sort_values("value", kind="stable", key=lambda column: column.map(place))
        ordered.append(of)
        by = of.astype({"accuracy": float}).groupby("value", sort=False)["accuracy"]
        mean = by.mean()
        style = styles[strategy]
        if len(mean) == 1:
            ax.axhline(mean.iat[0], color=style.color, linestyle=style.line, linewidth=1.2)
        x, ends = [place[v] for v in mean.index], [mean - by.min(), by.max() - mean]
        look = style.curve(1) | {"markersize": 6, "capsize": 3}
        ax.errorbar(x, mean, ends, label=strategy, **look)
        changes.append((strategy, mean.max() - mean.min()))
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
        f"changes by: {in_words(changes)}.",
        f"Line chart of accuracy by {key}. Range of the mean: {in_words(changes)}.",
        figure,
        pd.concat(ordered).rename(columns={"value": key}),
    )


def ablation_section(results: Results) -> Section:
    """One picture for each setting and share of clients that take part."""
    section = Section(
        "ablation",
        "Ablation",
        "What each part earns: runs that differ from one config by what stands at their side.",
    )
    runs = results.runs[results.runs["group"] == "ablation"]
    if runs.empty:
        section.missing.append("No cells of a group ablation.")
        return section
    shares = runs["config"].map(lambda config: f"{float(config['fraction-train']):.0%} take part")
    names = ["dataset", "model", "partition", shares]
    pictures = [
        _ablation_picture(", ".join(family), members)
        for family, members in runs.groupby(names, sort=False)
    ]
    section.parts = [Part("What each part earns", pictures)]
    return section


def _ablation_picture(title: str, runs: DataFrame) -> Picture:
    usual = {label: usual_config(of["config"]) for label, of in runs.groupby("strategy")}
    variants = [
        _variant_name(label, differences(config, usual[label]))
        for label, config in zip(runs["strategy"], runs["config"], strict=True)
    ]
    runs = runs.assign(variant=variants)
    order = list(runs["variant"].unique())
    # What all others are compared with stands on top: the first strategy, nothing changed.
    first = min(order, key=lambda name: name != runs["strategy"].iat[0])
    order = [first, *(name for name in order if name != first)]
    labels = [textwrap.fill(name, _LABEL, break_on_hyphens=False) for name in order]
    lines = 1 + max(label.count("\n") for label in labels)
    figure, axes = canvas(0.7 + (0.2 + 0.16 * lines) * len(order))
    ax, styles = axes[0, 0], looks(runs["algorithm"])
    by = runs.groupby("variant", sort=False)
    means = by[_ACCURACY].mean().loc[order].dropna()
    for row, name in enumerate(order):
        if name not in means:
            continue
        of, mean = by.get_group(name), means[name]
        algorithm = of["algorithm"].iat[0]
        accuracies = list(of[_ACCURACY].dropna())
        dots(ax, row, accuracies, styles[algorithm], hollow=algorithm != "fedfusion")
        above: Any = {"textcoords": "offset points", "ha": "center", "fontsize": "small"}
        ax.annotate(f"{mean:.3f}", (mean, row), (0, 6), **above)
        if name == first:
            ax.axvline(mean, color="black", linestyle=":", linewidth=1)
    name_rows(ax, labels)
    ax.margins(x=0.12)
    ax.set_xlabel("accuracy in the last round")
    numbers = pd.concat([by.get_group(name) for name in order])
    return Picture(
        f"ablation-{slug(title)}",
        f"Ablation: {title}",
        "Marks are means over seeds, lines go from the least to the greatest seed. The dotted line "
        f"is {first}. Filled marks are FedFusion, hollow ones other strategies, so that a gain can "
        "be attributed to what earns it.",
        f"Dot chart of accuracy by variant: {in_words(means.items())}.",
        figure,
        numbers[["variant", "seed", _ACCURACY]].rename(columns={_ACCURACY: "accuracy"}),
    )


def _variant_name(strategy: str, changed: Mapping[str, Any]) -> str:
    parts = [f"{key} {value:g}" if isinstance(value, float) else f"{key} {value}"
             for key, value in changed.items()]  # fmt: skip
    return f"{strategy} + {', '.join(parts)}" if parts else strategy
