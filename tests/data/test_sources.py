# SPDX-License-Identifier: Apache-2.0
"""Data sets and the cache of decoded arrays."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from fedfusion_flwr.config import DATASETS, RunConfig
from fedfusion_flwr.data import cache, sources
from fedfusion_flwr.data.cache import cached_arrays
from fedfusion_flwr.data.sources import DataError, FederatedData, data_for, load_data

ARRAYS = {"pixels": np.arange(12, dtype=np.uint8).reshape(3, 4), "labels": np.array([1, 2, 3])}


class Builder:
    """Counts how often it was asked."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self) -> dict[str, np.ndarray]:
        self.calls += 1
        return dict(ARRAYS)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FEDFUSION_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def digits() -> FederatedData:
    return load_data("mnist-5k")


def assert_same(arrays: dict[str, np.ndarray]) -> None:
    assert set(arrays) == set(ARRAYS)
    for name, value in ARRAYS.items():
        np.testing.assert_array_equal(arrays[name], value)
        assert arrays[name].dtype == value.dtype


def test_second_read_does_not_build(folder: Path) -> None:
    build = Builder()
    assert_same(cached_arrays("digits", build))
    assert_same(cached_arrays("digits", build))
    assert build.calls == 1
    # No temporary file stays behind.
    assert [path.name for path in folder.iterdir()] == ["digits.npz"]


def test_other_key_builds(folder: Path) -> None:
    build = Builder()
    cached_arrays("digits-1", build)
    cached_arrays("digits-2", build)
    assert build.calls == 2


def empty(path: Path) -> None:
    path.write_bytes(b"")


def garbage(path: Path) -> None:
    path.write_bytes(b"not an archive")


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-40])


def other_archive(path: Path) -> None:
    np.savez(path, **ARRAYS)


def wrong_content(path: Path) -> None:
    with np.load(path) as stored:
        arrays = {name: stored[name] for name in stored.files}
    arrays["labels"] = arrays["labels"] + 1
    np.savez(path, **arrays)


def pickled(path: Path) -> None:
    np.savez(path, labels=np.array([{}], dtype=object))


def one_array(path: Path) -> None:
    with path.open("wb") as file:
        np.save(file, ARRAYS["labels"])


@pytest.mark.parametrize(
    "damage", [empty, garbage, truncated, other_archive, wrong_content, pickled, one_array]
)
def test_damaged_cache_is_rebuilt(folder: Path, damage: Callable[[Path], None]) -> None:
    build = Builder()
    cached_arrays("digits", build)
    damage(folder / "digits.npz")
    assert_same(cached_arrays("digits", build))
    assert build.calls == 2
    assert_same(cached_arrays("digits", build))
    assert build.calls == 2


def test_every_flipped_byte_is_harmless(folder: Path) -> None:
    cached_arrays("digits", Builder())
    path = folder / "digits.npz"
    content = path.read_bytes()
    for position in range(0, len(content), 7):
        path.write_bytes(
            content[:position] + bytes([content[position] ^ 255]) + content[position + 1 :]
        )
        assert_same(cached_arrays("digits", Builder()))


def test_unwritable_cache_is_ignored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("FEDFUSION_CACHE", str(tmp_path / "file" / "cache"))
    assert_same(cached_arrays("digits", Builder()))


def test_failed_write_leaves_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full_disk(*_: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "replace", full_disk)
    assert_same(cached_arrays("digits", Builder()))
    assert list(folder.iterdir()) == []


def test_cache_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.delenv("FEDFUSION_CACHE", raising=False)
    assert cache.cache_directory() == Path("/home/someone/.cache/fedfusion")
    monkeypatch.setenv("FEDFUSION_CACHE", "~/elsewhere")
    assert cache.cache_directory() == Path("/home/someone/elsewhere")


def test_mnist_5k_shapes(digits: FederatedData) -> None:
    assert digits.name == "mnist-5k"
    assert digits.input_shape == (1, 28, 28)
    assert digits.num_classes == 10
    assert digits.x_train.shape == (4000, 1, 28, 28)
    assert digits.x_test.shape == (1000, 1, 28, 28)
    assert digits.y_train.bincount().tolist() == [400] * 10
    assert digits.y_test.bincount().tolist() == [100] * 10


def test_mnist_5k_normalization(digits: FederatedData) -> None:
    # (0 - .1307) / .3081 and (1 - .1307) / .3081
    x = digits.inputs(digits.x_train)
    assert x.min().item() == pytest.approx(-0.42421, abs=1e-4)
    assert x.max().item() == pytest.approx(2.82149, abs=1e-4)
    # The published mean and deviation are those of all 60000 digits.
    assert abs(x.mean().item()) < 0.05
    assert x.std().item() == pytest.approx(1, abs=0.05)


def test_mnist_5k_split_is_every_fifth_row(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = np.arange(20)

    def numbered(_key: str, _build: object) -> dict[str, np.ndarray]:
        pixels = np.tile(rows[:, None, None], (1, 28, 28)).astype(np.uint8)
        return {"pixels": pixels, "labels": rows // 2}

    monkeypatch.setattr(sources, "cached_arrays", numbered)
    data = sources.SOURCES["mnist-5k"](sources.SourceOptions())
    assert data.x_test[:, 0, 0, 0].tolist() == [4, 9, 14, 19]
    assert data.y_test.tolist() == [2, 4, 7, 9]
    assert len(data.x_train) == 16


def test_data_is_decoded_once(digits: FederatedData) -> None:
    assert load_data("mnist-5k") is digits
    assert load_data(name="mnist-5k", root="") is digits


def test_unknown_name_lists_the_known() -> None:
    with pytest.raises(DataError, match=r"`dataset` is 'minst'; known data sets: .*mnist-5k"):
        load_data("minst")


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("x_train", torch.zeros(3, 4, 4), r"train split .* shape \(N, C, H, W\)"),
        ("x_test", torch.zeros(3, 1, 4, 4, dtype=torch.float64), "test split .* float32"),
        ("y_train", torch.zeros(2, dtype=torch.int64), "one int64 label for each of its 3"),
        ("y_test", torch.zeros(3), "test split .* int64"),
        ("y_test", torch.tensor([0, 1, 2]), "labels from 0 to 1, got labels from 0 to 2"),
        ("y_train", torch.tensor([0, -1, 0]), "got labels from -1 to 0"),
        ("x_test", torch.zeros(3, 1, 5, 4), "examples of one shape"),
    ],
)
def test_wrong_arrays_are_refused(field: str, value: torch.Tensor, message: str) -> None:
    x, y = torch.zeros(3, 1, 4, 4), torch.tensor([0, 1, 0])
    valid = FederatedData("toy", x, y, x, y, num_classes=2)
    with pytest.raises(DataError, match=message):
        replace(valid, **{field: value})


def test_empty_split_is_refused() -> None:
    x, y = torch.zeros(3, 1, 4, 4), torch.tensor([0, 1, 0])
    with pytest.raises(DataError, match="at least one example"):
        FederatedData("toy", x, y, x[:0], y[:0], num_classes=2)


def test_every_data_set_is_documented() -> None:
    text = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
    for name in DATASETS:
        assert f"| `{name}`" in text


def test_part_of_a_data_set(digits: FederatedData) -> None:
    part = data_for(RunConfig(train_examples=300, test_examples=50))
    assert part is data_for(RunConfig(train_examples=300, test_examples=50, seed=7))
    assert (len(part.x_train), len(part.x_test)) == (300, 50)
    whole = data_for(RunConfig(train_examples=300))
    torch.testing.assert_close(whole.x_test, digits.x_test)
    # Sorted by class as the whole set is, with every class, each image with its own label.
    assert part.y_train.tolist() == sorted(part.y_train.tolist())
    assert set(part.y_train.tolist()) == set(range(10))
    drawn = labelled(part)
    assert len(drawn) == 300
    assert drawn < labelled(digits)


def labelled(data: FederatedData) -> set[tuple[bytes, int]]:
    """Every training image as its bytes, with its label."""
    pairs = zip(data.x_train, data.y_train, strict=True)
    return {(x.numpy().tobytes(), int(y)) for x, y in pairs}


def test_more_than_there_is_is_refused() -> None:
    with pytest.raises(
        DataError, match=r"`test-examples` is 1001, but data set 'mnist-5k' has 1000"
    ):
        data_for(RunConfig(test_examples=1001))
