# SPDX-License-Identifier: Apache-2.0
"""The accuracy of the last round: every setting and strategy, beside centralized training."""

from __future__ import annotations

import pandas as pd
from pandas import DataFrame

from fedfusion_flwr.experiments.figures import draw
from fedfusion_flwr.experiments.results import CENTRALIZED, Results, Setting, mean_and_spread, slug

MEASURES = {"global": "global-accuracy", "personalized": "personalized-accuracy"}
_MEANING = {
    "global": "The served global model on the server's test set",
    "personalized": "The model that serves each client on the client's own held-out examples, mean "
    "over clients",
}


def accuracy_section(results: Results) -> draw.Section:
    """Two tables of every group, and a picture of every setting."""
    section = draw.Section("accuracy")
    values = {setting: _values(results, setting, of) for setting, of in results.compared.items()}
    for group in dict.fromkeys(setting.group for setting in values):
        of = {setting: table for setting, table in values.items() if setting.group == group}
        tables = [_table(of, name) for name in MEASURES]
        pictures = [] if results.is_run else [_picture(s, table) for s, table in of.items()]
        section.parts.append(
            draw.Part(
                group or "All settings",
                [p for p in pictures if p is not None],
                [t for t in tables if t is not None],
            )
        )
    if not results.is_run:
        section.missing += [
            f"{setting}: no centralized reference of this data and model."
            for setting, table in values.items()
            if CENTRALIZED not in set(table["strategy"])
        ]
    return section


def _values(results: Results, setting: Setting, runs: DataFrame) -> DataFrame:
    """``strategy``, ``measure``, ``seed`` and ``accuracy``, in the order of the rows."""
    pooled = results.references_for(setting).assign(strategy=CENTRALIZED, measure="global")
    parts = [
        runs.assign(measure=name, accuracy=runs[metric]) for name, metric in MEASURES.items()
    ] + ([] if pooled.empty else [pooled])
    found = pd.concat([part[["strategy", "measure", "seed", "accuracy"]] for part in parts])
    return found.dropna(subset="accuracy").reset_index(drop=True)


def _table(values: dict[Setting, DataFrame], name: str) -> draw.Table | None:
    together = pd.concat(
        [
            table[table["measure"] == name].assign(**setting._asdict())
            for setting, table in values.items()
        ],
        ignore_index=True,
    )
    if together.empty:
        return None
    names = ["dataset", "model", "partition", "group", "strategy"]
    by = together.groupby(names, sort=False)["accuracy"]
    numbers = by.agg(**{"accuracy-mean": "mean", "accuracy-sd": "std", "runs": "size"})
    text = numbers.apply(lambda of: mean_and_spread(of["accuracy-mean"], of["accuracy-sd"]), axis=1)
    # A column a setting; centralized training, which is global only, stands below the strategies.
    strategies = pd.concat(values.values())["strategy"].unique()
    order = [s for s in strategies if s != CENTRALIZED]
    order += [CENTRALIZED] * (CENTRALIZED in set(together["strategy"]))
    columns = [(*setting[1:], setting.group) for setting in values]
    shown = text.unstack(names[:4]).reindex(index=order, columns=columns)
    shown = shown.astype(object).fillna("–")
    return draw.Table(
        slug(f"accuracy-table {name} {next(iter(values)).group}"),
        f"{name.capitalize()} accuracy. {_MEANING[name]}.",
        ["strategy", *(f"{s.dataset}, {s.model}, {s.partition}" for s in values)],
        shown.reset_index().to_numpy().tolist(),
        numbers.reset_index(),
    )


def _picture(setting: Setting, values: DataFrame) -> draw.Picture | None:
    of_runs = values[values["strategy"] != CENTRALIZED]
    if of_runs.empty:
        return None
    styles = draw.looks(of_runs["strategy"])
    figure, axes = draw.canvas(0.9 + 0.27 * len(styles))
    ax = axes[0, 0]
    for name, hollow, offset in (("global", False, -0.14), ("personalized", True, 0.14)):
        of = of_runs[of_runs["measure"] == name]
        for row, (strategy, style) in enumerate(styles.items()):
            accuracies = list(of.loc[of["strategy"] == strategy, "accuracy"])
            draw.dots(ax, row + offset, accuracies, style, hollow=hollow)
        if not of.empty:
            # A grey example for the legend: a colour is a strategy, a shape is a measure.
            shape, face = ("D", "white") if hollow else ("o", "0.4")
            ax.plot([], [], shape, color="0.4", markerfacecolor=face, label=name)
    pooled = values.loc[values["strategy"] == CENTRALIZED, "accuracy"]
    beside = ""
    if not pooled.empty:
        ax.axvline(pooled.mean(), color="black", linestyle="--", linewidth=1.2, label=CENTRALIZED)
        beside = f" Centralized training reaches {pooled.mean():.3f}."
    draw.name_rows(ax, list(styles))
    ax.set_xlabel("accuracy in the last round")
    draw.legend_above(figure, ax)
    of_global = of_runs[of_runs["measure"] == "global"]
    means = of_global.groupby("strategy", sort=False)["accuracy"].mean()
    best_first = draw.in_words(means.sort_values(ascending=False, kind="stable").items())
    return draw.Picture(
        f"accuracy-last-{setting.slug}",
        f"Last round: {setting}",
        "Markers are means over seeds, lines go from the least to the greatest seed. Filled: the "
        "global model on the server's test set. Hollow: each client's own model on its own data, "
        f"an easier task where a client has few classes.{beside}",
        f"Dot chart of accuracy by strategy. Global, best first: {best_first}.{beside}",
        figure,
        values,
    )
