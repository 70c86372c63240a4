# SPDX-License-Identifier: Apache-2.0
"""From texts to word numbers: tokens, a vocabulary, and rows of one length."""

from __future__ import annotations

import html
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from sys import intern

import numpy as np

from fedfusion_flwr.data.dataset import DataError
from fedfusion_flwr.data.roots import read_text

PADDING = "<pad>"
UNKNOWN = "<unk>"
URL = "<url>"
USER = "<user>"
RESERVED = (PADDING, UNKNOWN)
"""Words 0 and 1 of every vocabulary."""

VOCABULARY_FILE = "vocabulary.txt"

_URL = re.compile(r"(?:https?://|www\.)\S+")
# Not the middle of an e-mail address.
_USER = re.compile(r"(?<!\w)@\w+")
_ELONGATION = re.compile(r"([^\W\d_])\1{2,}")
_TOKEN = re.compile(
    rf"{URL}|{USER}"
    r"|<3|[:;=]['\-]?[()\[\]dp/|]+(?!\w)"  # emoticons, of lower-case letters
    r"|[^\W_]+(?:'[^\W_]+)*"
)


def tokenize(text: str) -> list[str]:
    """The tokens of a tweet or other short text, in order and in lower case; may be empty.

    A web address or a mention of a user becomes one token, hashtags keep their word, three or more
    equal letters in a row are squeezed to two, and HTML entities are unescaped.
    """
    text = html.unescape(text).lower().replace("’", "'")
    # Addresses first: squeezing would spoil their www.
    text = _USER.sub(f" {USER} ", _URL.sub(f" {URL} ", text))
    # Interned, because the same words recur in a million texts.
    return [intern(token) for token in _TOKEN.findall(_ELONGATION.sub(r"\1\1", text))]


def build_vocabulary(texts: Iterable[Sequence[str]], size: int) -> tuple[str, ...]:
    """The most frequent words of tokenized texts, after the reserved ones.

    Words are in the order of their numbers: by falling frequency, then alphabetically. There are at
    most ``size`` of them, reserved ones included; ``size`` is at least 3.
    """
    counts: Counter[str] = Counter()
    for tokens in texts:
        counts.update(tokens)
    ranked = sorted(counts, key=lambda word: (-counts[word], word))
    return RESERVED + tuple(ranked[: size - len(RESERVED)])


def read_vocabulary(folder: Path) -> tuple[str, ...] | None:
    """The words of ``vocabulary.txt``, line n (from 0) being word n; None without the file.

    Raises
    ------
    DataError
        If the file is not UTF-8 text, does not begin with the reserved words, has no others, or
        has an empty line or a word twice.
    """
    path = folder / VOCABULARY_FILE
    text = read_text(path)
    if text is None:
        return None
    words = tuple(text.removesuffix("\n").split("\n"))
    if words[:2] != RESERVED or len(words) == len(RESERVED):
        raise DataError(
            f"{path} must hold one word a line, {PADDING} and {UNKNOWN} first and at least one "
            "more; take it from the folder of the run that built it."
        )
    first: dict[str, int] = {}
    for number, word in enumerate(words):
        if not word or word != word.strip():
            raise DataError(f"{path}, line {number + 1} must hold one word, got {word!r}.")
        if word in first:
            raise DataError(f"{path} has {word!r} in lines {first[word] + 1} and {number + 1}.")
        first[word] = number
    return words


def encode(texts: Sequence[Sequence[str]], vocabulary: Sequence[str], length: int) -> np.ndarray:
    """Word numbers of N tokenized texts, (N, ``length``), int32.

    Longer texts are cut, shorter ones padded with 0 at their end. Words out of the vocabulary are
    1, and a text without words is one unknown word: no row is all padding.
    """
    numbers = {word: number for number, word in enumerate(vocabulary)}
    unknown = numbers[UNKNOWN]
    rows = np.zeros((len(texts), length), dtype=np.int32)
    for row, tokens in zip(rows, texts, strict=True):
        known = [numbers.get(token, unknown) for token in tokens[:length]] or [unknown]
        row[: len(known)] = known
    return rows
