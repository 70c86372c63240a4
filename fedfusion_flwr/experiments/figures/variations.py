# SPDX-License-Identifier: Apache-2.0
"""Runs that differ in their config: what one key does, and what each part of the method earns."""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Iterable, Mapping
from statistics import fmean
from typing import Any

import pandas as pd
from pandas import DataFrame, Series

from fedfusion_flwr.experiments.figures import draw
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
    items = Counter(item for config in configs for item in config.items())
    # Of one key the most frequent value comes last, and of equally frequent ones the first.
    return dict(item for item, _ in reversed(items.most_common()))


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


def with_changes(runs: DataFrame, by: str) -> DataFrame:
    """The runs with ``changed``: `differences` from the usual config of those alike in ``by``."""
    usual = {name: usual_config(of["config"]) for name, of in runs.groupby(by)}
    pairs = zip(runs[by], runs["config"], strict=True)
    return runs.assign(changed=[differences(config, usual[name]) for name, config in pairs])


def hyper_parameters_section(results: Results) -> draw.Section:
    """A picture of every key that is varied, for each data set, model and kind of partition."""
    section, runs = _section_of(results, "hyper-parameters")
    kinds = runs["config"].map(lambda config: config["partition"])
    for family, members in runs.groupby(["dataset", "model", kinds], sort=False):
        members = with_changes(members, "algorithm")
        for cell, changed in zip(members["cell"], members["changed"], strict=True):
            if len(changed) > 1:
                several = ", ".join(changed)
                section.missing.append(
                    f"Cell {cell} varies {several} at once and is in no picture."
                )
        members = members[members["changed"].map(len) < 2]
        keys = dict.fromkeys(key for changed in members["changed"] for key in changed)
        pictures = [_sweep_picture(family, key, members) for key in keys]
        if pictures:
            section.parts.append(draw.Part(", ".join(family), pictures))
    return section


def _section_of(results: Results, group: str) -> tuple[draw.Section, DataFrame]:
    section, runs = draw.Section(group), results.runs[results.runs["group"] == group]
    if runs.empty:
        section.missing.append(f"No cells of a group {group}.")
    return section, runs


def _sweep_picture(family: tuple[str, str, str], key: str, runs: DataFrame) -> draw.Picture:
    # A strategy that does not vary the key has its usual runs under the usual value.
    runs = runs[[not changed or key in changed for changed in runs["changed"]]]
    sweep = DataFrame(
        {
            "strategy": runs["algorithm"],
            "value": Series([config.get(key) for config in runs["config"]], runs.index, object),
            "seed": runs["seed"],
            "accuracy": runs[_ACCURACY],
        }
    ).dropna(subset="accuracy")
    values = sorted(set(sweep["value"]))
    numeric = all(isinstance(v, int | float) and not isinstance(v, bool) for v in values)
    place = {v: float(v) if numeric else float(i) for i, v in enumerate(values)}
    order = {strategy: i for i, strategy in enumerate(sweep["strategy"].unique())}
    sweep = sweep.assign(x=sweep["value"].map(place), row=sweep["strategy"].map(order))
    sweep = sweep.sort_values(["row", "x"], kind="stable")
    figure, axes = draw.canvas(3.0)
    ax, styles = axes[0, 0], draw.looks(sweep["strategy"])
    changes = []
    for strategy, of in sweep.groupby("strategy", sort=False):
        by, style = of.groupby("x")["accuracy"], styles[strategy]
        mean = by.mean()
        if len(mean) == 1:
            ax.axhline(mean.iat[0], color=style.color, linestyle=style.line, linewidth=1.2)
        look = style.curve(1) | {"markersize": 6, "capsize": 3}
        ends = [mean - by.min(), by.max() - mean]
        ax.errorbar(mean.index, mean, ends, label=strategy, **look)
        changes.append((strategy, mean.max() - mean.min()))
    if numeric and min(values) > 0:
        if max(values) >= _LOG_FROM * min(values):
            ax.set_xscale("log")
        ax.minorticks_off()
    ax.set_xticks(list(place.values()), [f"{v:g}" if numeric else str(v) for v in values])
    ax.set(xlabel=key, ylabel="accuracy in the last round")
    draw.legend_above(figure, ax)
    named = ", ".join(family)
    return draw.Picture(
        f"hyper-{slug(' '.join((*family, key)))}",
        f"{key}: {named}",
        f"Markers are means over seeds, bars go from the least to the greatest seed. A level line "
        f"is a strategy for which {key} was not varied. From the worst to the best value the mean "
        f"changes by: {draw.in_words(changes)}.",
        f"Line chart of accuracy by {key}. Range of the mean: {draw.in_words(changes)}.",
        figure,
        sweep[["strategy", "value", "seed", "accuracy"]].rename(columns={"value": key}),
    )


def ablation_section(results: Results) -> draw.Section:
    """One picture for each setting and share of clients that take part."""
    section, runs = _section_of(results, "ablation")
    shares = runs["config"].map(lambda config: f"{float(config['fraction-train']):.0%} take part")
    names = ["dataset", "model", "partition", shares]
    pictures = [
        _ablation_picture(", ".join(family), with_changes(members, "strategy"))
        for family, members in runs.groupby(names, sort=False)
    ]
    if pictures:
        section.parts = [draw.Part("What each part earns", pictures)]
    return section


def _ablation_picture(title: str, runs: DataFrame) -> draw.Picture:
    variants = [*map(_variant_name, runs["strategy"], runs["changed"])]
    runs = runs.assign(variant=variants)
    # What all others are compared with stands on top: the first strategy, nothing changed.
    first = min(variants, key=lambda name: name != runs["strategy"].iat[0])
    order = list(dict.fromkeys([first, *variants]))
    labels = [textwrap.fill(name, _LABEL, break_on_hyphens=False) for name in order]
    lines = 1 + max(label.count("\n") for label in labels)
    figure, axes = draw.canvas(0.7 + (0.2 + 0.16 * lines) * len(order))
    ax, styles = axes[0, 0], draw.looks(runs["algorithm"])
    above: Any = {"textcoords": "offset points", "ha": "center", "fontsize": "small"}
    by = {name: runs[runs["variant"] == name] for name in order}
    means = {}
    for row, (name, of) in enumerate(by.items()):
        accuracies = list(of[_ACCURACY].dropna())
        if not accuracies:
            continue
        algorithm, mean = of["algorithm"].iat[0], fmean(accuracies)
        means[name] = mean
        draw.dots(ax, row, accuracies, styles[algorithm], hollow=algorithm != "fedfusion")
        ax.annotate(f"{mean:.3f}", (mean, row), (0, 6), **above)
        if name == first:
            ax.axvline(mean, color="black", linestyle=":", linewidth=1)
    draw.name_rows(ax, labels)
    ax.margins(x=0.12)
    ax.set_xlabel("accuracy in the last round")
    numbers = pd.concat(by.values())
    return draw.Picture(
        f"ablation-{slug(title)}",
        f"Ablation: {title}",
        "Marks are means over seeds, lines go from the least to the greatest seed. The dotted line "
        f"is {first}. Filled marks are FedFusion, hollow ones other strategies, so that a gain can "
        "be attributed to what earns it.",
        f"Dot chart of accuracy by variant: {draw.in_words(means.items())}.",
        figure,
        numbers[["variant", "seed", _ACCURACY]].rename(columns={_ACCURACY: "accuracy"}),
    )


def _variant_name(strategy: str, changed: Mapping[str, Any]) -> str:
    parts = [f"{key} {value:g}" if isinstance(value, float) else f"{key} {value}"
             for key, value in changed.items()]  # fmt: skip
    return f"{strategy} + {', '.join(parts)}" if parts else strategy
