# SPDX-License-Identifier: Apache-2.0
"""Rows of the tweets' file that are left out: counted, never fatal."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import pytest

from fedfusion_flwr.data.sentiment140 import read_tweets
from tests.data.tweets import csv_bytes, toy_rows, tweet, write_tweets

Logged = Callable[[], list[str]]


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
