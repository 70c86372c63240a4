# SPDX-License-Identifier: Apache-2.0
"""``feature-bias.jsonl`` in a suite's folder: measures of feature bias, which outlive the models.

Models are large and stay where they were trained. Their measures are small: from these rows the
pictures can be drawn anywhere, and those of two machines are put together by concatenating files.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from pathlib import Path

from fedfusion_flwr.experiments.rows import write_rows
from fedfusion_flwr.report.bias_rows import BiasRow
from fedfusion_flwr.report.evidence import Cell, ReportError, Setting, parsed

FILE = "feature-bias.jsonl"


class BiasRows:
    """The rows of a suite's folder, and the lines that are none, a sentence each."""

    def __init__(self, path: Path, rows: list[BiasRow], damaged: list[str]) -> None:
        self.path = path
        self.rows = rows
        self.damaged = damaged

    @classmethod
    def read(cls, folder: Path) -> BiasRows:
        """Those of a folder; none where it has no such file."""
        path, rows, damaged = folder / FILE, [], []
        # Bytes that are no text make their own line unreadable, and no other.
        text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
        for number, line in enumerate(text.splitlines(), 1):
            try:
                row = parsed(Path(FILE), line, number)
            except ReportError as problem:
                damaged.append(f"{problem}; the line is ignored.")
                continue
            try:
                rows.append(BiasRow.from_row(row))
            except ReportError as problem:
                damaged.append(f"'{FILE}', line {number}, {problem}; the line is ignored.")
        return cls(path, rows, damaged)

    def of_cell(self, cell: Cell, references: Collection[str]) -> BiasRow | None:
        """The row of a run as it is now, measured on some of these references."""
        return self._newest(
            row
            for row in self.rows
            if (row.cell, row.digest) == (cell.name, cell.digest)
            and set(row.references) <= set(references)
        )

    def floor(self, setting: Setting, seed: int, references: Collection[str]) -> BiasRow | None:
        """The floor of a setting and seed, measured on some of these references."""
        return self._newest(
            row
            for row in self.rows
            if not row.cell
            and (row.setting, row.seed) == (setting, seed)
            and set(row.references) <= set(references)
        )

    def replace(self, measured: Iterable[BiasRow]) -> None:
        """Put rows in the place of those of the same runs, and write the file, all at once.

        Rows that cannot be told from others, for lack of a digest, are left out.

        Raises
        ------
        OSError
            If the file cannot be written.
        """
        new = [
            row for row in measured if all(row.references) and bool(row.cell) == bool(row.digest)
        ]
        if not new:
            return
        keys = {row.key for row in new}
        kept = [row for row in self.rows if row.key not in keys]
        # In an order of their own: the same whatever was measured when, and on which machine.
        self.rows = sorted([*kept, *new], key=lambda row: (row.key, row.digest, row.references))
        write_rows(self.path, (row.to_row() for row in self.rows))

    @staticmethod
    def _newest(rows: Iterable[BiasRow]) -> BiasRow | None:
        found = list(rows)
        return found[-1] if found else None
