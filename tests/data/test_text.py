# SPDX-License-Identifier: Apache-2.0
"""Tokens, vocabulary and encoding."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedfusion_flwr.data import DataError
from fedfusion_flwr.data.text import (
    RESERVED,
    VOCABULARY_FILE,
    build_vocabulary,
    encode,
    read_vocabulary,
    tokenize,
)


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("Off to WORK", ["off", "to", "work"]),
        ("see http://twitpic.com/2y1zl - Aww www.tweet.com!", ["see", "<url>", "aww", "<url>"]),
        ("HTTPS://X.com/a?b=c", ["<url>"]),
        ("@switchfoot and .@Loydie_2: hi", ["<user>", "and", "<user>", "hi"]),
        ("write me@home.org", ["write", "me", "home", "org"]),
        ("#FollowFriday #2", ["followfriday", "2"]),
        ("sooooo cooool goood 1000", ["soo", "cool", "good", "1000"]),
        ("SoOoOo", ["soo"]),
        ("I can't, don’t 'quote'", ["i", "can't", "don't", "quote"]),
        ("a &lt;3 &amp; b &quot;q&quot;", ["a", "<3", "b", "q"]),
        ("nice :) :-( ;D :/", ["nice", ":)", ":-(", ";d", ":/"]),
        ("at 10:30pm", ["at", "10", "30pm"]),
        ("Ünïcode été 日本", ["ünïcode", "été", "日本"]),
        ("snake_case", ["snake", "case"]),
        ("...!? --", []),
        ("", []),
    ],
)
def test_tokens(text: str, tokens: list[str]) -> None:
    assert tokenize(text) == tokens


@given(st.text())
def test_tokens_are_single_words(text: str) -> None:
    tokens = tokenize(text)
    assert all(token == token.strip() and len(token.split()) == 1 for token in tokens)
    # A line of the vocabulary file each, that comes back as it was.
    assert "\n".join(tokens).split("\n") == (tokens or [""])
    assert all(token.encode().decode() == token for token in tokens)
    assert not set(tokens) & set(RESERVED)


def test_vocabulary_by_frequency_then_alphabet() -> None:
    texts = [["b", "c", "c"], ["a", "b"], ["d"]]
    assert build_vocabulary(texts, 10) == (*RESERVED, "b", "c", "a", "d")
    assert build_vocabulary(texts, 5) == (*RESERVED, "b", "c", "a")
    assert build_vocabulary(reversed(texts), 5) == (*RESERVED, "b", "c", "a")


def test_encoding_by_hand() -> None:
    texts = [["b", "a"], ["a", "x", "b", "b"], [], ["a", "b", "a"]]
    rows = encode(texts, (*RESERVED, "a", "b"), 3)
    assert rows.tolist() == [[3, 2, 0], [2, 1, 3], [1, 0, 0], [2, 3, 2]]


@given(
    st.lists(st.lists(st.sampled_from("abcdef"), max_size=8), min_size=1, max_size=5),
    st.integers(3, 9),
    st.integers(1, 6),
)
def test_padding_only_at_the_end(texts: list[list[str]], size: int, length: int) -> None:
    rows = encode(texts, build_vocabulary(texts, size), length)
    lengths = (rows != 0).sum(1)
    assert lengths.tolist() == [max(1, min(len(tokens), length)) for tokens in texts]
    for row, end in zip(rows, lengths, strict=True):
        assert (row[:end] > 0).all()
        assert (row < size).all()
        assert not row[end:].any()
    assert rows.dtype == np.int32


def write(folder: Path, *lines: str) -> Path:
    (folder / VOCABULARY_FILE).write_text("\n".join(lines), "utf-8", "surrogateescape")
    return folder


@pytest.mark.parametrize("end", [(), ("",)])
def test_vocabulary_file(tmp_path: Path, end: tuple[str, ...]) -> None:
    assert read_vocabulary(tmp_path) is None
    write(tmp_path, *RESERVED, "été", "can't", *end)
    assert read_vocabulary(tmp_path) == (*RESERVED, "été", "can't")


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ((), "<pad> and <unk> first and at least one more; take it from the folder of the run"),
        (RESERVED, "at least one more"),
        (("<unk>", "<pad>", "a"), "<pad> and <unk> first"),
        ((*RESERVED, "a", "b", "a"), "'a' in lines 3 and 5"),
        ((*RESERVED, "a", "", "b"), "line 4 must hold one word, got ''"),
        ((*RESERVED, "a "), "line 3 must hold one word, got 'a '"),
        ((*RESERVED, "\udcff"), "cannot be read as UTF-8 text"),
    ],
)
def test_wrong_vocabulary_files(tmp_path: Path, lines: tuple[str, ...], message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_vocabulary(write(tmp_path, *lines))
