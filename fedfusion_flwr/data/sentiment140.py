# SPDX-License-Identifier: Apache-2.0
"""Sentiment140 (Go, Bhayani and Huang 2009): tweets that are negative or positive."""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from logging import WARNING
from pathlib import Path
from typing import IO, cast

import numpy as np
import torch
from flwr.common.logger import log

from fedfusion_flwr.data.cache import cached_arrays
from fedfusion_flwr.data.dataset import DataError, FederatedData
from fedfusion_flwr.data.roots import data_folder
from fedfusion_flwr.data.text import build_vocabulary, encode, read_vocabulary, tokenize

TRAINING_FILE = "training.1600000.processed.noemoticon.csv"
ARCHIVE = "trainingandtestdata.zip"
CLASSES = ("negative", "positive")

_TEST_FILE = "testdata.manual.2009.06.14.csv"
_KNOWN_NAMES = (TRAINING_FILE, f"{TRAINING_FILE}.gz", ARCHIVE)
_PATTERNS = ("*.csv", "*.csv.gz", "*.zip")
_COLUMNS = 6
"""target, id, date, flag, user, text."""
_LABELS = {"0": 0, "4": 1}
_NEUTRAL = "2"
_HELD_OUT = 10
_SPLITS = ("x_train", "y_train", "x_test", "y_test")
_FORMAT = 1
"""Of the cached arrays: raise it with every change of tokens, split or encoding."""


@dataclass
class Tweets:
    """The usable rows of a file, and how many rows were left out for which reason."""

    texts: list[list[str]] = field(default_factory=list)
    """Tokens of each tweet."""
    labels: list[int] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    """Number of each tweet's row in the file, from 0."""
    users: list[str] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)

    @property
    def reasons(self) -> str:
        """What was left out, in words; empty if nothing was."""
        return ", ".join(f"{n} {reason}" for reason, n in sorted(self.left_out.items()))


def sentiment140(root: str, vocabulary_size: int, text_length: int) -> FederatedData:
    """The tweets of a file, a tenth of them held out by their row numbers.

    The file, plain, gzipped or in a zip archive, is the root or lies in it; without a root it is
    looked for in ``data`` in the cache folder. The vocabulary is ``vocabulary.txt`` if it lies
    beside the file, else at most so many words of the training part; longer tweets are cut.
    """
    path = find_file(data_folder(root))
    vocabulary = read_vocabulary(path.parent)
    status = path.stat()
    identity = (path.name, status.st_size, status.st_mtime_ns, vocabulary_size, text_length)
    key = hashlib.sha256(repr((_FORMAT, identity, vocabulary)).encode()).hexdigest()[:32]
    arrays = cached_arrays(
        f"sentiment140-{key}", lambda: _decode(path, vocabulary, vocabulary_size, text_length)
    )
    x_train, y_train, x_test, y_test = (
        torch.from_numpy(arrays[name].astype(np.int64)) for name in _SPLITS
    )
    words, users = tuple(arrays["vocabulary"].tolist()), arrays["users"]
    splits = (x_train, y_train, x_test, y_test)
    return FederatedData(
        "sentiment140", *splits, len(CLASSES), classes=CLASSES, vocabulary=words, users=users
    )


def find_file(root: Path) -> Path:
    """The file itself, or the one in the folder: of an official name, or the only one."""
    if root.is_file():
        return root
    known = [root / name for name in _KNOWN_NAMES if (root / name).is_file()]
    fitting = known[:1] or sorted(
        path for pattern in _PATTERNS for path in root.glob(pattern) if path.name != _TEST_FILE
    )
    if not fitting:
        raise DataError(
            f"`dataset` 'sentiment140' finds no tweets in {root}: download {ARCHIVE} from "
            f"help.sentiment140.com/for-students and put it, or the {TRAINING_FILE} inside, into "
            "that folder, or set `data-root` to where it lies."
        )
    if len(fitting) > 1:
        raise DataError(
            f"`dataset` 'sentiment140' cannot choose in {root} between "
            f"{', '.join(path.name for path in fitting)}: set `data-root` to one of them."
        )
    return fitting[0]


def read_tweets(path: Path) -> Tweets:
    """The usable tweets of a file, tokenized; one log line counts the rows that are left out."""
    tweets = Tweets()
    try:
        with ExitStack() as stack:
            for number, row in enumerate(_rows(_open(path, stack))):
                _add(tweets, number, row)
    except (OSError, EOFError, zlib.error, zipfile.BadZipFile, RuntimeError) as problem:
        raise DataError(
            f"{path} cannot be read ({type(problem).__name__}: {problem}); download it again."
        ) from problem
    if tweets.left_out:
        total = len(tweets.labels) + tweets.left_out.total()
        log(WARNING, "%s: left out %s of %d rows", path.name, tweets.reasons, total)
    return tweets


def held_out(rows: np.ndarray) -> np.ndarray:
    """Whether each row of the file is a test example, (N,), bool; about one in ten.

    By a hash of its number, so that every file is split evenly, however it is sorted.
    """
    return np.array([zlib.crc32(b"%d" % row) % _HELD_OUT == 0 for row in rows], dtype=bool)


def _decode(
    path: Path, vocabulary: tuple[str, ...] | None, size: int, length: int
) -> dict[str, np.ndarray]:
    tweets = read_tweets(path)
    test = held_out(np.array(tweets.rows))
    if test.all() or not test.any():
        raise DataError(
            f"{path} has {len(test)} usable tweets, too few to train and test on (left out: "
            f"{tweets.reasons or 'nothing'}); it must hold the columns target (0 or 4), id, date, "
            "flag, user and text."
        )
    if vocabulary is None:
        training = (tokens for tokens, tested in zip(tweets.texts, test, strict=True) if not tested)
        vocabulary = build_vocabulary(training, size)
    x, y = encode(tweets.texts, vocabulary, length), np.array(tweets.labels, dtype=np.uint8)
    arrays = dict(zip(_SPLITS, (x[~test], y[~test], x[test], y[test]), strict=True))
    users = np.array(tweets.users)[~test]
    return {**arrays, "users": users, "vocabulary": np.array(vocabulary)}


def _add(tweets: Tweets, number: int, row: list[str]) -> None:
    if len(row) != _COLUMNS:
        tweets.left_out["with a wrong number of columns"] += 1
    elif row[0] == _NEUTRAL:
        tweets.left_out["neutral"] += 1
    elif row[0] not in _LABELS:
        tweets.left_out["with an unknown label"] += 1
    elif not row[5].strip():
        tweets.left_out["without text"] += 1
    else:
        tweets.texts.append(tokenize(row[5]))
        tweets.labels.append(_LABELS[row[0]])
        tweets.rows.append(number)
        tweets.users.append(row[4])


def _rows(file: IO[bytes]) -> Iterator[list[str]]:
    """The rows of a CSV file; a row that the csv module refuses is empty."""
    reader = csv.reader(io.TextIOWrapper(file, encoding="latin-1", newline=""))
    while True:
        try:
            yield next(reader)
        except StopIteration:
            return
        except csv.Error:
            yield []


def _open(path: Path, stack: ExitStack) -> IO[bytes]:
    if path.suffix == ".zip":
        archive = stack.enter_context(zipfile.ZipFile(path))
        return stack.enter_context(archive.open(_member(path, archive)))
    if path.suffix == ".gz":
        return cast(IO[bytes], stack.enter_context(gzip.GzipFile(path)))
    return stack.enter_context(path.open("rb"))


def _member(path: Path, archive: zipfile.ZipFile) -> str:
    names = {Path(name).name: name for name in archive.namelist() if name.endswith(".csv")}
    names.pop(_TEST_FILE, None)
    if TRAINING_FILE in names:
        return names[TRAINING_FILE]
    if len(names) != 1:
        raise DataError(
            f"{path} must hold {TRAINING_FILE} or just one CSV file, it holds "
            f"{', '.join(sorted(names)) or 'none'}."
        )
    return next(iter(names.values()))
