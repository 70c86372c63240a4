# SPDX-License-Identifier: Apache-2.0
"""Tables of a comparison: group-bys of its runs, and their files.

Markdown is to read, CSV and JSON are to compute with. Every function takes the runs of
`results.runs_table`, whose numbers are those of the last round.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from pandas import DataFrame, Series

from fedfusion_flwr.experiments.intervals import cluster_bootstrap, t_interval
from fedfusion_flwr.experiments.results import (
    ACCURACIES,
    METRICS,
    SETTING,
    mean_and_spread,
    runs_table,
)
from fedfusion_flwr.experiments.rows import Row, write_text

FOLDER = "tables"
BASELINE = "fedfusion"
TARGET_SHARE = 0.9
"""The target accuracy of a setting, as a share of the best strategy's mean."""
TITLES = {
    "accuracy": "Accuracy and loss of the last round: mean over seeds, sample standard deviation",
    "ranks": "Mean rank over settings; 1 is best",
    "differences": (
        "Paired differences over (setting, seed): mean, Student's 95 % interval over the pairs, "
        "95 % bootstrap interval over settings, pairs above and below 0"
    ),
    "target": (
        f"Cost of first reaching {TARGET_SHARE:.0%} of the best strategy's global accuracy: "
        "means over the seeds that reach it"
    ),
    "costs": "Cost of whole runs: means over seeds",
    "tuning": "Candidates of the tuning; the score is the mean over their cells",
}
_RUN = [*SETTING, "strategy"]
_COSTS = [
    "rounds",
    "client-steps",
    "bytes",
    "extra-forward-examples",
    "server-aggregations",
    "seconds",
]


def write_tables(folder: Path, rows: Sequence[Row], tuning: DataFrame | None = None) -> list[Path]:
    """Write ``tables/*.md``, ``*.csv`` and ``*.json``; empty tables are left out.

    Parameters
    ----------
    folder : Path
        Of the suite's results.
    rows : sequence of rows
        Of ``cells.jsonl``.
    tuning : DataFrame or None
        See `tuning.candidates`.
    """
    tables = {"tuning": DataFrame() if tuning is None else tuning}
    written = {}
    if rows:
        runs, rounds = runs_table(rows)
        tables |= {
            "accuracy": accuracy(runs),
            "ranks": ranks(runs),
            "differences": differences(runs),
            "target": to_target(runs, rounds),
            "costs": costs(runs),
        }
        written["main.md"] = main_table(tables["accuracy"])
    for name, table in tables.items():
        if not table.empty:
            written[f"{name}.md"] = f"# {TITLES[name]}\n\n{markdown(table)}"
            written[f"{name}.csv"] = table.to_csv(index=False, lineterminator="\n")
            written[f"{name}.json"] = json.dumps(records(table), indent=1) + "\n"
    for name, text in written.items():
        write_text(folder / FOLDER / name, text)
    return [folder / FOLDER / name for name in written]


def exact_mean(values: Series) -> float:
    """The mean of what is not NaN, rounded once: equal sums have equal means and equal ranks."""
    known = [float(value) for value in values.dropna()]
    return float(statistics.mean(known)) if known else math.nan


def accuracy(runs: DataFrame) -> DataFrame:
    """Mean and spread over seeds of the last round's accuracies and loss, by setting and strategy.

    The spread is the sample standard deviation, and NaN where there is one seed.
    """
    by = runs.groupby(_RUN, sort=False)
    parts = [by.size().rename("seeds")]
    for metric in METRICS:
        parts += [by[metric].agg(exact_mean), by[metric].std().rename(f"{metric}-spread")]
    return _settings_together(pd.concat(parts, axis=1).reset_index())


def ranks(runs: DataFrame) -> DataFrame:
    """Mean rank of every strategy over the settings of its group, by group and accuracy.

    Ranked are the means over seeds, 1 is best, equals share the mean of their ranks. A setting
    counts only if every strategy of the group has the accuracy in it.
    """
    tables = []
    for (group, metric), of in _by_group_and_accuracy(runs):
        strategies = of["strategy"].unique()
        means = of.groupby(_RUN, sort=False)["value"].agg(exact_mean).unstack()
        rank = means[strategies].dropna().rank(axis=1, ascending=False)
        table = DataFrame(
            {
                "group": group,
                "metric": metric,
                "strategy": strategies,
                "rank": rank.mean().to_numpy(),
                "wins": (rank < 2).sum().to_numpy(),
                "settings": len(rank),
            }
        )
        if len(rank):
            tables.append(table.sort_values("rank", kind="stable"))
    return pd.concat(tables, ignore_index=True) if tables else DataFrame()


def differences(runs: DataFrame, baseline: str = BASELINE) -> DataFrame:
    """The baseline's accuracy minus every other strategy's, paired by (setting, seed).

    For each group as a whole, and for each of its settings: mean, Student's 95 % interval over the
    pairs, in how many pairs the baseline is above and below. For a group also the 95 % bootstrap
    interval that draws whole settings: pairs of one setting are alike, which Student's ignores.
    """
    lines = []
    for (group, metric), of in _by_group_and_accuracy(runs):
        ours = of[of["strategy"] == baseline]
        for strategy in of["strategy"].unique():
            if strategy == baseline:
                continue
            theirs = of[of["strategy"] == strategy]
            pairs = ours.merge(theirs, on=[*SETTING, "seed"], suffixes=("", " of the other"))
            pairs["value"] -= pairs["value of the other"]
            by = pairs.dropna(subset="value").groupby(SETTING, sort=False)["value"]
            parts = {setting: list(values) for setting, values in by}
            everything = [value for values in parts.values() for value in values]
            all_settings = {(group, "all", "all", "all"): everything} if everything else {}
            bootstrap = cluster_bootstrap([*parts.values()])
            for setting, values in (all_settings | parts).items():
                t = t_interval(values)
                line = dict(zip(SETTING, setting, strict=True)) | {
                    "metric": metric,
                    "difference": f"{baseline} - {strategy}",
                    "pairs": len(values),
                    "mean": statistics.mean(values),
                    "t-low": t and t.low,
                    "t-high": t and t.high,
                    "bootstrap-low": bootstrap and bootstrap.low,
                    "bootstrap-high": bootstrap and bootstrap.high,
                    "above": sum(value > 0 for value in values),
                    "below": sum(value < 0 for value in values),
                }
                lines.append(line)
                bootstrap = None
    return DataFrame(lines)


def to_target(runs: DataFrame, rounds: DataFrame, share: float = TARGET_SHARE) -> DataFrame:
    """What it costs to first reach a global accuracy, by setting and strategy.

    The target is ``share`` of the best strategy's mean in the last round of that setting. Rounds,
    bytes (both ways) and gradient steps up to the first round that reaches it are means over the
    seeds that do, and NaN if none does.
    """
    means = runs.groupby(_RUN, sort=False)["global-accuracy"].mean()
    best = means.groupby(SETTING, sort=False).max().rename("target") * share
    runs = runs[_RUN].join(best, on=SETTING).dropna(subset="target")
    later = rounds[rounds["round"] > 0].join(runs["target"], on="run", how="inner")
    first = later[later["global-accuracy"] >= later["target"]].groupby("run").first()
    costs = first[["round", "bytes", "steps"]].set_axis(["rounds", "bytes", "client-steps"], axis=1)
    by = runs.join(costs).groupby(_RUN, sort=False)
    table = by.agg(
        target=("target", "first"), reached=("rounds", "count"), seeds=("target", "size")
    ).join(by[["rounds", "bytes", "client-steps"]].mean())
    return _settings_together(table.reset_index())


def costs(runs: DataFrame) -> DataFrame:
    """What whole runs cost: means over seeds of rounds, gradient steps, bytes and seconds."""
    by = runs.groupby(_RUN, sort=False)
    table = by.size().rename("seeds").to_frame().join(by[_COSTS].mean().astype(float))
    return _settings_together(table.reset_index())


def main_table(accuracy: DataFrame) -> str:
    """Strategies against partitions: what a reader wants first.

    A table for each group, data set and accuracy. The best mean of a column is bold.
    """
    parts = []
    for (group, dataset), of in accuracy.groupby(["group", "dataset"], sort=False):
        for metric in ACCURACIES:
            if of[metric].notna().any():
                parts.append(f"## {group}, {dataset}: {metric}\n\n{_crossed(of, metric)}")
    return "\n".join(parts)


def _crossed(accuracy: DataFrame, metric: str) -> str:
    column = accuracy["model"] + ", " + accuracy["partition"]
    best = accuracy[metric] == accuracy.groupby(column)[metric].transform("max")
    means = accuracy[[metric, f"{metric}-spread"]].astype(float).itertuples(index=False)
    text = ["" if math.isnan(mean) else mean_and_spread(mean, spread) for mean, spread in means]
    text = [f"**{value}**" if bold else value for value, bold in zip(text, best, strict=True)]
    crossed = accuracy.assign(text=text, column=column).pivot(
        index="strategy", columns="column", values="text"
    )
    crossed = crossed.loc[accuracy["strategy"].unique(), column.unique()]
    return markdown(crossed.fillna("").reset_index())


def records(table: DataFrame) -> list[Row]:
    """A dict a line; what is missing is None."""
    lines = table.astype(object).where(table.notna(), None).to_dict("records")
    return [{str(name): value for name, value in line.items()} for line in lines]


def markdown(table: DataFrame) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(table.columns) + " |", "|" + "---|" * len(table.columns)]
    for record in records(table):
        lines.append("| " + " | ".join(map(_shown, record.values())) + " |")
    return "\n".join(lines) + "\n"


def _shown(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.4f}" if abs(value) < 100 else f"{value:.0f}"
    return str(value)


def _by_group_and_accuracy(runs: DataFrame) -> Iterator[tuple[tuple[str, str], DataFrame]]:
    """The runs of each group for each accuracy, which is ``value``."""
    names = [*_RUN, "seed"]
    for group, of in runs.groupby("group", sort=False):
        for metric in ACCURACIES:
            yield (group, metric), of[[*names, metric]].rename(columns={metric: "value"})


def _settings_together(table: DataFrame) -> DataFrame:
    """Lines of one setting one after the other, settings in the order of their first line."""
    number: Series = table.groupby(SETTING, sort=False).ngroup()
    return table.iloc[number.argsort(kind="stable")].reset_index(drop=True)
