# SPDX-License-Identifier: Apache-2.0
"""The accuracy of the last round: every setting and strategy, beside centralized training."""

from __future__ import annotations

import statistics

from fedfusion_flwr.report.evidence import Cell, Evidence, Setting, by_strategy, slug
from fedfusion_flwr.report.pictures import (
    CENTRALIZED,
    Numbers,
    Part,
    Picture,
    Section,
    Table,
    canvas,
    dots,
    in_words,
    legend_above,
    looks,
    name_rows,
)

MEASURES = {"global": "global-accuracy", "personalized": "personalized-accuracy"}
_MEANING = {
    "global": "The served global model on the server's test set",
    "personalized": "The model that serves each client on the client's own held-out examples, mean "
    "over clients",
}


def last_values(cells: list[Cell], metric: str) -> list[float]:
    """The metric's last value of every run that has it, ordered by seed."""
    told = [cell.last(metric) for cell in sorted(cells, key=lambda cell: cell.seed)]
    return [value for value in told if value is not None]


def centralized_values(evidence: Evidence, setting: Setting) -> list[float]:
    """The last accuracy of every centralized model of the setting's data and model."""
    return [r.accuracy[-1] for r in evidence.references_for(setting) if r.accuracy]


def mean_and_spread(values: list[float]) -> str:
    """``0.912 ± 0.004``: mean and sample standard deviation; the mean alone of one value."""
    if not values:
        return "–"
    if len(values) == 1:
        return f"{values[0]:.3f}"
    return f"{statistics.mean(values):.3f} ± {statistics.stdev(values):.3f}"


def accuracy_section(evidence: Evidence) -> Section:
    """Two tables, and a picture of every setting."""
    section = Section(
        "accuracy",
        "Accuracy in the last round",
        "The last round, not the best one: which round is best is not known without the test set. "
        "Numbers are means and sample standard deviations over seeds.",
    )
    groups: dict[str, dict[Setting, list[Cell]]] = {}
    for setting, cells in evidence.compared.items():
        groups.setdefault(setting.group, {})[setting] = cells
    for group, settings in groups.items():
        tables = [_table(evidence, settings, name) for name in MEASURES]
        pictures = [_picture(evidence, setting, cells) for setting, cells in settings.items()]
        section.parts.append(
            Part(
                group or "All settings",
                [] if evidence.is_run else [p for p in pictures if p is not None],
                [t for t in tables if t is not None],
            )
        )
    if evidence.is_run:
        return section
    section.missing += [
        f"{setting}: no centralized reference of this data and model."
        for setting in evidence.compared
        if not centralized_values(evidence, setting)
    ]
    return section


def _table(evidence: Evidence, settings: dict[Setting, list[Cell]], name: str) -> Table | None:
    strategies = list(by_strategy(c for cells in settings.values() for c in cells))
    columns: dict[str, dict[Setting, list[float]]] = {
        strategy: {
            setting: last_values([c for c in cells if c.strategy == strategy], MEASURES[name])
            for setting, cells in settings.items()
        }
        for strategy in strategies
    }
    if name == "global":
        pooled = {setting: centralized_values(evidence, setting) for setting in settings}
        columns |= {CENTRALIZED: pooled} if any(pooled.values()) else {}
    if not any(values for by_setting in columns.values() for values in by_setting.values()):
        return None
    numbers: Numbers = [
        {
            "dataset": setting.dataset,
            "model": setting.model,
            "partition": setting.partition,
            "group": setting.group,
            "strategy": strategy,
            "accuracy-mean": statistics.mean(values),
            "accuracy-sd": statistics.stdev(values) if len(values) > 1 else None,
            "runs": len(values),
        }
        for strategy, by_setting in columns.items()
        for setting, values in by_setting.items()
        if values
    ]
    group = next(iter(settings)).group
    return Table(
        slug(f"accuracy-table {name} {group}"),
        f"{name.capitalize()} accuracy. {_MEANING[name]}.",
        ["strategy", *(f"{s.dataset}, {s.model}, {s.partition}" for s in settings)],
        [
            [strategy, *(mean_and_spread(by_setting[s]) for s in settings)]
            for strategy, by_setting in columns.items()
        ],
        numbers,
    )


def _picture(evidence: Evidence, setting: Setting, cells: list[Cell]) -> Picture | None:
    runs = by_strategy(cells)
    values = {
        name: {s: told for s, of in runs.items() if (told := last_values(of, metric))}
        for name, metric in MEASURES.items()
    }
    if not any(values.values()):
        return None
    figure, axes = canvas(0.9 + 0.27 * len(runs))
    ax, styles = axes[0, 0], looks(runs)
    for name, hollow, offset in (("global", False, -0.14), ("personalized", True, 0.14)):
        for row, strategy in enumerate(runs):
            told = values[name].get(strategy, [])
            dots(ax, row + offset, told, styles[strategy], hollow=hollow)
        if values[name]:
            # A grey example for the legend: a colour is a strategy, a shape is a measure.
            shape, face = ("D", "white") if hollow else ("o", "0.4")
            ax.plot([], [], shape, color="0.4", markerfacecolor=face, label=name)
    pooled = centralized_values(evidence, setting)
    if pooled:
        reference = statistics.mean(pooled)
        ax.axvline(reference, color="black", linestyle="--", linewidth=1.2, label=CENTRALIZED)
    name_rows(ax, list(runs))
    ax.set_xlabel("accuracy in the last round")
    legend_above(figure, ax)
    means = sorted(
        ((s, statistics.mean(told)) for s, told in values["global"].items()),
        key=lambda pair: -pair[1],
    )
    beside = f" Centralized training reaches {statistics.mean(pooled):.3f}." if pooled else ""
    return Picture(
        f"accuracy-last-{setting.slug}",
        f"Last round: {setting}",
        "Markers are means over seeds, lines go from the least to the greatest seed. Filled: the "
        "global model on the server's test set. Hollow: each client's own model on its own data, "
        f"an easier task where a client has few classes.{beside}",
        f"Dot chart of accuracy by strategy. Global, best first: {in_words(means)}.{beside}",
        figure,
        [
            {
                "strategy": cell.strategy,
                "measure": name,
                "seed": cell.seed,
                "accuracy": cell.last(metric),
            }
            for name, metric in MEASURES.items()
            for cell in cells
            if cell.last(metric) is not None
        ]
        + [
            {
                "strategy": CENTRALIZED,
                "measure": "global",
                "seed": reference.seed,
                "accuracy": reference.accuracy[-1],
            }
            for reference in evidence.references_for(setting)
            if reference.accuracy
        ],
    )
