# SPDX-License-Identifier: Apache-2.0
"""Small files in the layout of Sentiment140, and the big one where it is present."""

from __future__ import annotations

import csv
import gzip
import io
import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import pytest

from tests.data.files import SHARED

REAL = SHARED / "sentiment140-100k.csv.gz"
needs_real = pytest.mark.skipif(
    not REAL.is_file(),
    reason=f"{REAL.name} is not here: set FEDFUSION_SHARED_DATA to the folder that holds it",
)

MOODS = {"0": ("sad", "awful", "crying"), "4": ("great", "lovely", "happy")}
FILLERS = ("the", "bus", "today", "work", "monday", "tea", "rain", "friend")
Row = Sequence[str]


def tweet(target: str, text: str, user: str = "") -> Row:
    return (target, "1", "Mon Apr 06 22:19:45 PDT 2009", "NO_QUERY", user, text)


def toy_rows(count: int, users: int = 0) -> list[Row]:
    """Sorted by label, as the official file is; one word of mood among fillers gives the label."""
    rng = np.random.default_rng(0)
    rows = []
    for number in range(count):
        target = "0" if number < count // 2 else "4"
        words = list(rng.choice(FILLERS, rng.integers(1, 6)))
        words.insert(rng.integers(len(words) + 1), rng.choice(MOODS[target]))
        user = f"user{rng.integers(users)}" if users else ""
        rows.append(tweet(target, " ".join(words), user))
    return rows


def csv_bytes(rows: Iterable[Row]) -> bytes:
    """Latin-1 with every field quoted."""
    text = io.StringIO()
    csv.writer(text, quoting=csv.QUOTE_ALL, lineterminator="\n").writerows(rows)
    return text.getvalue().encode("latin-1")


def write_tweets(path: Path, rows: Iterable[Row]) -> Path:
    """Plain or gzipped, as the suffix says."""
    content = csv_bytes(rows)
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def write_zip(path: Path, members: dict[str, Iterable[Row]]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, rows in members.items():
            archive.writestr(name, csv_bytes(rows))
    return path
