# SPDX-License-Identifier: Apache-2.0
"""Tables as files: Markdown to read, CSV and JSON to go on with."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedfusion_flwr.experiments import tables
from fedfusion_flwr.experiments.rows import Row, write_text
from fedfusion_flwr.experiments.tables import Records

FOLDER = "tables"
TITLES = {
    "accuracy": "Accuracy and loss of the last round: mean over seeds, sample standard deviation",
    "ranks": "Mean rank over settings; 1 is best",
    "differences": (
        "Paired differences over (setting, seed): mean, Student's 95 % interval over the pairs, "
        "95 % bootstrap interval over settings, pairs above and below 0"
    ),
    "target": (
        f"Cost of first reaching {tables.TARGET_SHARE:.0%} of the best strategy's global accuracy: "
        "means over the seeds that reach it"
    ),
    "costs": "Cost of whole runs: means over seeds",
    "tuning": "Candidates of the tuning; the score is the mean over their cells",
}


def write_tables(folder: Path, rows: Sequence[Row], tuning: Sequence[Row] = ()) -> list[Path]:
    """Write ``tables/*.md``, ``*.csv`` and ``*.json``; tables without a record are left out.

    Parameters
    ----------
    folder : Path
        Of the suite's results.
    rows : sequence of rows
        Of ``cells.jsonl``.
    tuning : Records
        What the tuning's candidates reached.
    """
    records = {
        "accuracy": tables.accuracy(rows),
        "ranks": tables.ranks(rows),
        "differences": tables.differences(rows),
        "target": tables.to_target(rows),
        "costs": tables.costs(rows),
        "tuning": list(tuning),
    }
    written = {}
    for name, table in records.items():
        if table:
            written[f"{name}.md"] = f"# {TITLES[name]}\n\n{markdown(table)}"
            written[f"{name}.csv"] = comma_separated(table)
            written[f"{name}.json"] = json.dumps(table, indent=1) + "\n"
    if rows:
        written["main.md"] = main_table(records["accuracy"])
    for name, text in written.items():
        write_text(folder / FOLDER / name, text)
    return [folder / FOLDER / name for name in written]


def main_table(accuracy: Records) -> str:
    """Strategies against partitions: what a reader wants first.

    A table for each group, data set and accuracy. The best mean of a column is bold.
    """
    parts = []
    for group, dataset in dict.fromkeys((r["group"], r["dataset"]) for r in accuracy):
        of = [r for r in accuracy if (r["group"], r["dataset"]) == (group, dataset)]
        for metric in tables.ACCURACIES:
            if any(record[metric] is not None for record in of):
                parts.append(f"## {group}, {dataset}: {metric}\n\n{_crossed(of, metric)}")
    return "\n".join(parts)


def _crossed(accuracy: Records, metric: str) -> str:
    columns = list(dict.fromkeys(_column(record) for record in accuracy))
    cells = {(record["strategy"], _column(record)): record for record in accuracy}
    best = {
        column: max((r[metric] for r in accuracy if _column(r) == column and r[metric]), default=1)
        for column in columns
    }
    table = []
    for strategy in dict.fromkeys(record["strategy"] for record in accuracy):
        row = {"strategy": strategy}
        for column in columns:
            record = cells.get((strategy, column), {})
            mean, deviation = record.get(metric), record.get(f"{metric}-spread")
            text = "" if mean is None else f"{mean:.3f}"
            if deviation is not None:
                text += f" ± {deviation:.3f}"
            row[column] = f"**{text}**" if mean == best[column] else text
        table.append(row)
    return markdown(table)


def _column(record: Row) -> str:
    return f"{record['model']}, {record['partition']}"


def markdown(table: Records) -> str:
    """A Markdown table of flat records that share their keys."""
    names = list(table[0])
    lines = ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    lines += ["| " + " | ".join(_shown(record[name]) for name in names) + " |" for record in table]
    return "\n".join(lines) + "\n"


def comma_separated(table: Records) -> str:
    """The same as CSV, numbers in full."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(table[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(table)
    return text.getvalue()


def _shown(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.4f}" if abs(value) < 100 else f"{value:.0f}"
    return str(value)
