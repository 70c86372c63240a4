# SPDX-License-Identifier: Apache-2.0
"""The file of tweets: where it is found, what is read, and what becomes of it."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch

from fedfusion_flwr.data import DataError, FederatedData, load_data
from fedfusion_flwr.data import sentiment140 as module
from fedfusion_flwr.data.sentiment140 import ARCHIVE, TRAINING_FILE, held_out, read_tweets
from fedfusion_flwr.data.text import RESERVED, VOCABULARY_FILE, tokenize
from tests.data.tweets import (
    FILLERS,
    MOODS,
    REAL,
    csv_bytes,
    needs_real,
    toy_rows,
    tweet,
    write_tweets,
    write_zip,
)

TEST_FILE = "testdata.manual.2009.06.14.csv"
Logged = Callable[[], list[str]]
pytestmark = pytest.mark.usefixtures("cache")


def load(root: Path, size: int = 1000, length: int = 8) -> FederatedData:
    return module.sentiment140(str(root), size, length)


def texts(data: FederatedData, x: torch.Tensor) -> list[list[str]]:
    return [[data.vocabulary[n] for n in row if n] for row in x.tolist()]


# --- what is loaded


def test_rows_become_numbers(tmp_path: Path) -> None:
    rows = toy_rows(200, users=7)
    data = load(write_tweets(tmp_path / "tweets.csv", rows))
    test, labels = held_out(np.arange(200)), np.arange(200) // 100
    for x, y, chosen in ((data.x_train, data.y_train, ~test), (data.x_test, data.y_test, test)):
        assert texts(data, x) == [tokenize(rows[n][5]) for n in np.flatnonzero(chosen)]
        assert y.tolist() == labels[chosen].tolist()
    assert data.users is not None
    assert data.users.tolist() == [rows[n][4] for n in np.flatnonzero(~test)]
    assert data.x_train.dtype == data.y_train.dtype == torch.int64
    assert data.input_shape == (8,)
    assert data.is_text
    assert data.classes == ("negative", "positive")
    assert set(data.vocabulary) == {*RESERVED, *FILLERS, *MOODS["0"], *MOODS["4"]}


def test_a_tenth_is_held_out_whatever_the_order_of_labels() -> None:
    test = held_out(np.arange(20_000))
    assert test.mean() == pytest.approx(0.1, abs=0.01)
    assert test[:10_000].mean() == pytest.approx(0.1, abs=0.01)
    assert test[::2].mean() == pytest.approx(0.1, abs=0.01)
    # By the number alone: nothing that comes before or after matters.
    np.testing.assert_array_equal(held_out(np.arange(100, 200)), test[100:200])


def test_vocabulary_is_of_the_training_part(tmp_path: Path) -> None:
    test = held_out(np.arange(100))
    rows = [tweet("04"[n % 2], "seen" if not test[n] else "hidden") for n in range(100)]
    data = load(write_tweets(tmp_path / "tweets.csv", rows))
    assert data.vocabulary == (*RESERVED, "seen")
    assert data.x_test[:, 0].tolist() == [1] * int(test.sum())


def test_vocabulary_and_length_are_limited(tmp_path: Path) -> None:
    data = load(write_tweets(tmp_path / "tweets.csv", toy_rows(200)), size=5, length=2)
    assert len(data.vocabulary) == 5
    assert data.x_train.shape[1] == 2
    assert int(data.x_train.max()) == 4
    assert bool((data.x_train[:, 0] > 0).all())


def test_latin_1_quotes_and_texts_without_words(tmp_path: Path) -> None:
    rows = [tweet("04"[n % 2], 'caf\xe9 said "hello, you"') for n in range(40)]
    rows[0] = tweet("0", "...")
    data = load(write_tweets(tmp_path / "tweets.csv", rows))
    assert texts(data, data.x_train)[:2] == [["<unk>"], ["café", "said", "hello", "you"]]


def test_given_vocabulary_is_used(tmp_path: Path) -> None:
    write_tweets(tmp_path / "tweets.csv", toy_rows(200))
    built = load(tmp_path)
    file = tmp_path / VOCABULARY_FILE
    file.write_text("<pad>\n<unk>\nmonday\nhappy\n", encoding="utf-8")
    given = load(tmp_path, size=3)
    assert given.vocabulary == (*RESERVED, "monday", "happy")
    assert int(given.x_train.max()) == 3
    assert given.signature != built.signature
    # Also if the root is the file itself.
    assert load(tmp_path / "tweets.csv").vocabulary == given.vocabulary
    # What one run built reads back as the same data.
    file.write_text("\n".join(built.vocabulary) + "\n", encoding="utf-8")
    again = load(tmp_path)
    assert torch.equal(again.x_train, built.x_train)
    assert again.signature == built.signature


# --- rows that are left out: counted, never fatal


@pytest.fixture
def logged(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> Logged:
    monkeypatch.setattr(logging.getLogger("flwr"), "propagate", True)
    return lambda: [record.message for record in caplog.records]


def test_what_is_left_out_is_counted_in_one_line(tmp_path: Path, logged: Logged) -> None:
    good = toy_rows(100)
    header = ("target", "ids", "date", "flag", "user", "text")
    bad = [header, tweet("2", "neutral"), tweet("2", "so so"), tweet("0", "  "), ("0", "short")]
    path = write_tweets(tmp_path / "tweets.csv", [*bad, *good])
    tweets = read_tweets(path)
    assert logged() == [
        "tweets.csv: left out 2 neutral, 1 with a wrong number of columns, "
        "1 with an unknown label, 1 without text of 105 rows"
    ]
    assert len(tweets.texts) == 100
    # The numbers of the rows are those of the file.
    assert tweets.rows == list(range(5, 105))


def test_nothing_left_out_is_not_mentioned(tmp_path: Path, logged: Logged) -> None:
    read_tweets(write_tweets(tmp_path / "tweets.csv", toy_rows(10)))
    assert not logged()


def test_an_open_quote_costs_no_more_than_its_neighbour(tmp_path: Path) -> None:
    lines = csv_bytes(toy_rows(50)).splitlines(keepends=True)
    lines[10] = lines[10].rstrip(b'"\n') + b"\n"
    (tmp_path / "tweets.csv").write_bytes(b"".join(lines))
    tweets = read_tweets(tmp_path / "tweets.csv")
    assert len(tweets.texts) == 48
    assert dict(tweets.left_out) == {"with a wrong number of columns": 1}


def test_a_field_beyond_the_limit_of_csv_is_one_bad_row(tmp_path: Path) -> None:
    rows = toy_rows(50)
    rows[20] = tweet("0", "long " * 40_000)
    tweets = read_tweets(write_tweets(tmp_path / "tweets.csv", rows))
    assert len(tweets.texts) == 49
    assert tweets.left_out.total() == 1


# --- where the file is


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], r"has 0 usable tweets, too few .*\(left out: nothing\)"),
        ([tweet("2", "neutral")] * 9, r"has 0 usable tweets, .*\(left out: 9 neutral\)"),
        ([tweet("0", "sad")] * 3, "has 3 usable tweets, too few to train and test on"),
        ([("a", "b")] * 5, r"5 with a wrong number of columns\); it must hold the columns target"),
    ],
)
def test_too_few_tweets(tmp_path: Path, rows: list[Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        load(write_tweets(tmp_path / "tweets.csv", rows))


@pytest.mark.parametrize("name", ["tweets.csv", "tweets.csv.gz", TRAINING_FILE, ARCHIVE, "my.zip"])
def test_file_and_folder_give_the_same(tmp_path: Path, name: str) -> None:
    rows = toy_rows(120)
    if name.endswith(".zip"):
        member = TRAINING_FILE if name == ARCHIVE else "folder/tweets.csv"
        path = write_zip(tmp_path / name, {member: rows, TEST_FILE: [tweet("0", "of the test")]})
    else:
        path = write_tweets(tmp_path / name, rows)
        write_tweets(tmp_path / TEST_FILE, [tweet("0", "of the test")])
    expected = load(write_tweets(tmp_path.parent / f"{tmp_path.name}.csv", rows))
    for root in (path, tmp_path):
        data = load(root)
        assert torch.equal(data.x_train, expected.x_train)
        assert torch.equal(data.x_test, expected.x_test)
        assert data.vocabulary == expected.vocabulary


def test_official_names_come_first(tmp_path: Path) -> None:
    write_tweets(tmp_path / "other.csv", toy_rows(50))
    write_zip(tmp_path / ARCHIVE, {TRAINING_FILE: toy_rows(80)})
    assert len(load(tmp_path).y_train) == (~held_out(np.arange(80))).sum()
    write_tweets(tmp_path / TRAINING_FILE, toy_rows(100))
    assert len(load(tmp_path).y_train) == (~held_out(np.arange(100))).sum()


def test_several_files_are_named(tmp_path: Path) -> None:
    for name in ("b.csv", "a.csv.gz"):
        write_tweets(tmp_path / name, toy_rows(50))
    with pytest.raises(DataError, match=r"between a\.csv\.gz, b\.csv: set `data-root` to one"):
        load(tmp_path)


@pytest.mark.parametrize("folder", ["", "absent"])
def test_no_file_says_what_to_put_where(tmp_path: Path, folder: str) -> None:
    write_tweets(tmp_path / TEST_FILE, toy_rows(50))
    with pytest.raises(DataError) as caught:
        load(tmp_path / folder)
    for part in (str(tmp_path / folder), ARCHIVE, TRAINING_FILE, "help.sentiment140.com"):
        assert part in str(caught.value)


def test_without_a_root_it_is_looked_for_in_the_cache(cache: Path) -> None:
    with pytest.raises(DataError, match=f"no tweets in {cache / 'data'}"):
        load_data("sentiment140")
    (cache / "data").mkdir(parents=True)
    write_tweets(cache / "data" / "tweets.csv", toy_rows(60))
    data = load_data("sentiment140", vocabulary_size=6, text_length=3)
    assert data.x_train.shape[1] == 3
    assert len(data.vocabulary) == 6


@pytest.mark.parametrize("name", ["tweets.csv.gz", "tweets.zip"])
@pytest.mark.parametrize("damage", ["cut", "other", "flipped"])
def test_damaged_archives(tmp_path: Path, name: str, damage: str) -> None:
    path = tmp_path / name
    if name.endswith(".gz"):
        write_tweets(path, toy_rows(500))
    else:
        write_zip(path, {"tweets.csv": toy_rows(500)})
    content = bytearray(path.read_bytes())
    if damage == "flipped":
        content[200:260] = bytes(60)
    path.write_bytes(content[:-100] if damage == "cut" else content)
    if damage == "other":
        path.write_bytes(b"<html>not found</html>")
    with pytest.raises(DataError, match=rf"{name} cannot be read \(.*download it again"):
        load(path)


@pytest.mark.parametrize(
    ("members", "holds"), [({}, "none"), ({"a.csv": [], "b.csv": []}, r"a\.csv, b\.csv")]
)
def test_archive_without_one_file(tmp_path: Path, members: dict[str, Any], holds: str) -> None:
    with pytest.raises(DataError, match=f"or just one CSV file, it holds {holds}"):
        load(write_zip(tmp_path / "tweets.zip", members))


# --- the cache


def test_decoded_once(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = Mock(side_effect=read_tweets)
    monkeypatch.setattr(module, "read_tweets", read)
    path = write_tweets(tmp_path / "tweets.csv", toy_rows(100, users=5))
    first, again = load(path), load(path)
    assert read.call_count == len(list(cache.iterdir())) == 1
    assert torch.equal(first.x_train, again.x_train)
    assert first.vocabulary == again.vocabulary
    assert first.users is not None
    np.testing.assert_array_equal(first.users, again.users)
    load(path, size=5)
    load(path, length=5)
    assert read.call_count == 3
    os.utime(path, (1, 1))
    load(path)
    assert read.call_count == 4
    (tmp_path / VOCABULARY_FILE).write_text("<pad>\n<unk>\nmonday", encoding="utf-8")
    load(path)
    assert read.call_count == 5


# --- the real thing


@needs_real
def test_100_000_tweets() -> None:
    data = load(REAL, size=20_000, length=40)
    assert len(data.y_train) + len(data.y_test) == 100_000
    assert len(data.y_test) / 100_000 == pytest.approx(0.1, abs=0.005)
    for labels in (data.y_train, data.y_test):
        assert float(labels.double().mean()) == pytest.approx(0.5, abs=0.01)
    assert len(data.vocabulary) == 20_000
    assert {"<user>", "<url>", "i", "the", "love"} <= set(data.vocabulary[2:100])
    assert float((data.x_train == 1).sum() / (data.x_train > 0).sum()) < 0.05
