# SPDX-License-Identifier: Apache-2.0
"""Tables made of a comparison's rows. Every function takes rows and gives flat records.

Numbers are those of a run's last round, never of its best: that one would be chosen by the data it
is measured on. A setting is (group, data set, model, partition).
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from scipy.stats import rankdata

from fedfusion_flwr.experiments.rows import Row
from fedfusion_flwr.experiments.statistics import cluster_bootstrap, spread, t_interval

Records = list[Row]
METRICS = ("global-accuracy", "personalized-accuracy", "global-loss")
ACCURACIES = METRICS[:2]
BASELINE = "fedfusion"
TARGET_SHARE = 0.9
"""The target accuracy of a setting, as a share of the best strategy's mean."""


class Setting(NamedTuple):
    """What runs have in common that are compared."""

    group: str
    dataset: str
    model: str
    partition: str


def setting_of(row: Row) -> Setting:
    """The setting of a row."""
    return Setting(row["group"], row["dataset"], row["model"], row["partition"])


def last(row: Row, metric: str) -> float | None:
    """A metric in the last round after round 0 that has it."""
    values = [r[metric] for r in row["metrics"] if r["round"] and r.get(metric) is not None]
    return values[-1] if values else None


def total(row: Row, *metrics: str) -> float:
    """Costs summed over all rounds."""
    return float(sum(r.get(metric) or 0.0 for r in row["metrics"] for metric in metrics))


def accuracy(rows: Sequence[Row]) -> Records:
    """Mean and spread over seeds of the last round's accuracies and loss, by setting and strategy.

    The spread is the sample standard deviation, and empty where there is one seed.
    """
    return [
        {
            **setting._asdict(),
            "strategy": strategy,
            "seeds": len(of),
            **_summary(of, "global-accuracy"),
            **_summary(of, "personalized-accuracy"),
            **_summary(of, "global-loss"),
        }
        for setting, strategy, of in _by_strategy(rows)
    ]


def _summary(rows: Sequence[Row], metric: str) -> Row:
    values = _values(rows, metric)
    mean = statistics.mean(values) if values else None
    return {metric: mean, f"{metric}-spread": spread(values)}


def ranks(rows: Sequence[Row]) -> Records:
    """Mean rank of every strategy over the settings of its group, by group and accuracy.

    Ranked are the means over seeds, 1 is best, equals share the mean of their ranks. Only settings
    in which every strategy of the group has the accuracy count, so that all are ranked over the
    same.
    """
    records = []
    for group in dict.fromkeys(row["group"] for row in rows):
        for metric in ACCURACIES:
            records += _ranks(group, metric, [row for row in rows if row["group"] == group])
    return records


def _ranks(group: str, metric: str, rows: Sequence[Row]) -> Records:
    means: dict[Setting, dict[str, float]] = {}
    strategies = dict.fromkeys(row["strategy"] for row in rows)
    for setting, strategy, of in _by_strategy(rows):
        if values := _values(of, metric):
            means.setdefault(setting, {})[strategy] = statistics.mean(values)
    whole = [found for found in means.values() if found.keys() == strategies.keys()]
    if not whole:
        return []
    of_setting = [rankdata([-found[s] for s in strategies]) for found in whole]
    records = [
        {
            "group": group,
            "metric": metric,
            "strategy": strategy,
            "rank": float(statistics.mean(r[number] for r in of_setting)),
            "wins": sum(bool(r[number] < 2) for r in of_setting),
            "settings": len(whole),
        }
        for number, strategy in enumerate(strategies)
    ]
    return sorted(records, key=lambda record: record["rank"])


def differences(rows: Sequence[Row], baseline: str = BASELINE) -> Records:
    """The baseline's accuracy minus every other strategy's, paired by (setting, seed).

    For each group as a whole, and for each of its settings: mean, Student's 95 % interval over the
    pairs, in how many pairs the baseline is above and below. For a group also the 95 % bootstrap
    interval that draws whole settings: pairs of one setting are alike, which Student's does not
    know.
    """
    records = []
    for group in dict.fromkeys(row["group"] for row in rows):
        of_group = [row for row in rows if row["group"] == group]
        for metric in ACCURACIES:
            for strategy in dict.fromkeys(row["strategy"] for row in of_group):
                if strategy != baseline:
                    records += _differences(of_group, baseline, strategy, metric)
    return records


def _differences(rows: Sequence[Row], baseline: str, strategy: str, metric: str) -> Records:
    pairs: dict[Setting, list[float]] = {}
    others = {
        (setting_of(row), row["seed"]): last(row, metric)
        for row in rows
        if row["strategy"] == strategy
    }
    for row in rows:
        if row["strategy"] == baseline:
            ours, theirs = last(row, metric), others.get((setting_of(row), row["seed"]))
            if ours is not None and theirs is not None:
                pairs.setdefault(setting_of(row), []).append(ours - theirs)
    if not pairs:
        return []
    group = rows[0]["group"]
    everything = Setting(group, "all", "all", "all")
    together = [value for values in pairs.values() for value in values]
    bootstrap = cluster_bootstrap(list(pairs.values()))
    records = []
    for setting, values in [(everything, together), *pairs.items()]:
        t = t_interval(values)
        clustered = bootstrap if setting is everything else None
        records.append(
            {
                **setting._asdict(),
                "metric": metric,
                "difference": f"{baseline} - {strategy}",
                "pairs": len(values),
                "mean": statistics.mean(values),
                "t-low": t and t.low,
                "t-high": t and t.high,
                "bootstrap-low": clustered and clustered.low,
                "bootstrap-high": clustered and clustered.high,
                "above": sum(value > 0 for value in values),
                "below": sum(value < 0 for value in values),
            }
        )
    return records


def to_target(rows: Sequence[Row], share: float = TARGET_SHARE) -> Records:
    """What it costs to first reach a global accuracy, by setting and strategy.

    The target is ``share`` of the best strategy's mean in the last round of that setting. Rounds,
    bytes (both ways) and gradient steps up to the first round that reaches it are means over the
    seeds that do, and empty where none does.
    """
    best: dict[Setting, float] = {}
    for setting, _, of in _by_strategy(rows):
        if values := _values(of, "global-accuracy"):
            best[setting] = max(best.get(setting, 0.0), statistics.mean(values))
    records = []
    for setting, strategy, of in _by_strategy(rows):
        if setting not in best:
            continue
        target = share * best[setting]
        reached = [costs for row in of if (costs := _costs_until(row, target)) is not None]
        means = [statistics.mean(column) for column in zip(*reached, strict=True)] or [None] * 3
        records.append(
            {
                **setting._asdict(),
                "strategy": strategy,
                "target": target,
                "reached": len(reached),
                "seeds": len(of),
                **dict(zip(("rounds", "bytes", "client-steps"), means, strict=True)),
            }
        )
    return records


def _costs_until(row: Row, target: float) -> tuple[float, float, float] | None:
    """Rounds, bytes and steps up to the first round after 0 that reaches the target."""
    moved = steps = 0.0
    for r in row["metrics"]:
        moved += (r.get("bytes-down") or 0.0) + (r.get("bytes-up") or 0.0)
        steps += r.get("client-steps") or 0.0
        if r["round"] and (r.get("global-accuracy") or 0.0) >= target:
            return float(r["round"]), moved, steps
    return None


def costs(rows: Sequence[Row]) -> Records:
    """What whole runs cost: means over seeds of rounds, gradient steps, bytes and seconds."""
    measures: dict[str, Callable[[Row], float]] = {
        "rounds": lambda row: float(row["metrics"][-1]["round"]),
        "client-steps": lambda row: total(row, "client-steps"),
        "bytes": lambda row: total(row, "bytes-down", "bytes-up"),
        "extra-forward-examples": lambda row: total(row, "extra-forward-examples"),
        "server-aggregations": lambda row: total(row, "server-aggregations"),
        "seconds": lambda row: float(row["seconds"]),
    }
    return [
        {
            **setting._asdict(),
            "strategy": strategy,
            "seeds": len(of),
            **{n: statistics.mean(measure(row) for row in of) for n, measure in measures.items()},
        }
        for setting, strategy, of in _by_strategy(rows)
    ]


def _values(rows: Sequence[Row], metric: str) -> list[float]:
    return [value for row in rows if (value := last(row, metric)) is not None]


def _by_strategy(rows: Sequence[Row]) -> Iterator[tuple[Setting, str, list[Row]]]:
    """Rows of one setting and strategy, settings and strategies in the order of their first row."""
    found: dict[Setting, dict[str, list[Row]]] = {}
    for row in rows:
        found.setdefault(setting_of(row), {}).setdefault(row["strategy"], []).append(row)
    for setting, strategies in found.items():
        for strategy, of in strategies.items():
            yield setting, strategy, of
