# SPDX-License-Identifier: Apache-2.0
"""The cache of decoded arrays: read once, rebuilt if damaged, never in the way."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from fedfusion_flwr.data.cache import cache_directory, cached_arrays

ARRAYS = {"pixels": np.arange(12, dtype=np.uint8).reshape(3, 4), "labels": np.array([1, 2, 3])}


class Builder:
    """Counts how often it was asked."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self) -> dict[str, np.ndarray]:
        self.calls += 1
        return dict(ARRAYS)


def cached(build: Callable[[], dict[str, np.ndarray]], key: str = "digits") -> None:
    """Reads or builds, and what comes back is right."""
    arrays = cached_arrays(key, build)
    assert set(arrays) == set(ARRAYS)
    for name, value in ARRAYS.items():
        np.testing.assert_array_equal(arrays[name], value)
        assert arrays[name].dtype == value.dtype


def test_second_read_does_not_build(cache: Path) -> None:
    build = Builder()
    cached(build)
    cached(build)
    assert build.calls == 1
    # No temporary file stays behind.
    assert [path.name for path in cache.iterdir()] == ["digits.npz"]
    cached(build, "digits-2")
    assert build.calls == 2


def wrong_content(path: Path) -> None:
    with np.load(path) as stored:
        arrays = dict(stored)
    np.savez(path, **{**arrays, "labels": arrays["labels"] + 1})


def one_array(path: Path) -> None:
    with path.open("wb") as file:
        np.save(file, ARRAYS["labels"])


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b"not an archive"),
        lambda path: path.write_bytes(path.read_bytes()[:-40]),
        lambda path: np.savez(path, **ARRAYS),
        lambda path: np.savez(path, labels=np.array([{}], dtype=object)),
        wrong_content,
        one_array,
    ],
    ids=["empty", "garbage", "truncated", "no digest", "pickled", "wrong content", "one array"],
)
def test_damaged_cache_is_rebuilt(cache: Path, damage: Callable[[Path], object]) -> None:
    build = Builder()
    cached(build)
    damage(cache / "digits.npz")
    cached(build)
    assert build.calls == 2
    cached(build)
    assert build.calls == 2


def test_every_flipped_byte_is_harmless(cache: Path) -> None:
    cached(Builder())
    content = (cache / "digits.npz").read_bytes()
    for position in range(0, len(content), 7):
        flipped = bytearray(content)
        flipped[position] ^= 255
        (cache / "digits.npz").write_bytes(flipped)
        cached(Builder())


def test_unwritable_cache_is_ignored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("FEDFUSION_CACHE", str(tmp_path / "file" / "cache"))
    cached(Builder())


def test_failed_write_leaves_nothing(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full_disk(*_: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "replace", full_disk)
    cached(Builder())
    assert list(cache.iterdir()) == []


def test_cache_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.delenv("FEDFUSION_CACHE", raising=False)
    assert cache_directory() == Path("/home/someone/.cache/fedfusion")
    monkeypatch.setenv("FEDFUSION_CACHE", "~/elsewhere")
    assert cache_directory() == Path("/home/someone/elsewhere")
