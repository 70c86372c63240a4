# SPDX-License-Identifier: Apache-2.0
"""The user's own arrays in a .npz file."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedfusion_flwr.data.dataset import DataError, FederatedData
from fedfusion_flwr.data.npz import npz

PIXELS = np.arange(4 * 5 * 6 * 3, dtype=np.uint8).reshape(4, 5, 6, 3)


def save(path: Path, **changes: Any) -> Path:
    arrays = {
        "x_train": PIXELS,
        "y_train": np.array([0, 1, 2, 0], np.uint8),
        "x_test": PIXELS[:2],
        "y_test": np.array([1, 0], np.int16),
    }
    arrays |= changes
    np.savez(path, **{name: value for name, value in arrays.items() if value is not None})
    return path


def load(path: Path, **changes: Any) -> FederatedData:
    return npz(str(save(path / "data.npz", **changes)))


def test_channels_last(tmp_path: Path) -> None:
    data = load(tmp_path)
    assert data.x_train.shape == (4, 3, 5, 6)
    assert data.x_train[1, 2, 3, 4].item() == PIXELS[1, 3, 4, 2]
    assert data.y_train.tolist() == [0, 1, 2, 0]
    assert data.num_classes == 3
    assert data.mean == pytest.approx(PIXELS.mean((0, 1, 2)) / 255)
    assert data.std == pytest.approx(PIXELS.std((0, 1, 2)) / 255)


@pytest.mark.parametrize(
    ("shape", "input_shape"),
    [
        ((4, 5, 6), (1, 5, 6)),
        ((4, 5, 6, 1), (1, 5, 6)),
        ((4, 3, 5, 6), (3, 5, 6)),
        ((4, 8, 5, 6), (8, 5, 6)),
        ((4, 3, 9, 3), (3, 3, 9)),
    ],
)
def test_where_the_channels_are(
    tmp_path: Path, shape: tuple[int, ...], input_shape: tuple[int, ...]
) -> None:
    x = np.random.default_rng(0).integers(256, size=shape, dtype=np.uint8)
    assert load(tmp_path, x_train=x, x_test=x[:2]).input_shape == input_shape


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_floating_point_is_used_as_it_is(tmp_path: Path, dtype: Any) -> None:
    x = (PIXELS - 7.25).astype(dtype)
    data = load(tmp_path, x_train=x, x_test=x[:2])
    assert data.x_train.dtype == torch.float32
    assert data.inputs(data.x_train) is data.x_train
    np.testing.assert_array_equal(data.x_train.permute(0, 2, 3, 1).numpy(), x)


def test_files_beside_it(tmp_path: Path) -> None:
    (tmp_path / "classes.txt").write_text("a\nb\nc\nd\n")
    (tmp_path / "moments.txt").write_text("0.1 0.2 0.3\n1 2 4\n")
    data = load(tmp_path)
    assert data.num_classes == 4
    assert data.classes == ("a", "b", "c", "d")
    assert (data.mean, data.std) == ((0.1, 0.2, 0.3), (1, 2, 4))
    (tmp_path / "classes.txt").write_text("a\nb\n")
    with pytest.raises(DataError, match="labels from 0 to 1, got labels from 0 to 2"):
        load(tmp_path)


def test_which_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"holds 0 \.npz files"):
        npz(str(tmp_path))
    only = save(tmp_path / "only.npz")
    assert npz(str(tmp_path)).name == str(only)
    other = save(tmp_path / "other.npz")
    with pytest.raises(DataError, match=r"holds 2 \.npz files; name the one"):
        npz(str(tmp_path))
    assert npz(str(other)).name == str(other)
    save(tmp_path / "data.npz")
    assert npz(str(tmp_path)).name == str(tmp_path / "data.npz")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"y_test": None, "other": np.zeros(1)}, "lacks y_test; it holds .*other"),
        ({"x_train": PIXELS.astype(np.int64)}, "x_train in .* is int64; save pixels as uint8"),
        ({"x_train": PIXELS.astype(np.float16)}, "x_train in .* is float16"),
        ({"x_test": PIXELS[:2] > 7}, "x_test in .* is bool"),
        ({"x_train": PIXELS[:, 0, 0]}, r"x_train in .* has shape \(4, 3\); .* texts need"),
        ({"x_train": PIXELS[:0]}, r"x_train in .* has shape \(0, 5, 6, 3\)"),
        ({"x_train": np.full(PIXELS.shape, np.nan)}, "x_train in .* not finite"),
        ({"x_train": np.full(PIXELS.shape, 1e300)}, "x_train in .* not finite float32"),
        ({"x_test": PIXELS[:2, :4]}, "examples of one shape and type"),
        ({"x_test": PIXELS[:2] / 255}, r"got .*torch\.uint8.* and .*torch\.float32"),
        ({"y_train": np.zeros(4)}, r"y_train in .* is float64 of shape \(4,\)"),
        ({"y_train": np.eye(4, dtype=int)}, r"y_train in .* of shape \(4, 4\)"),
        ({"y_train": np.zeros(3, int)}, "one int64 label for each of its 4"),
        ({"y_train": np.array([0, -1, 0, 1])}, "labels from -1 to 1"),
        ({"y_train": np.zeros(4, int), "y_test": np.zeros(2, int)}, "one class only"),
        ({"x_train": np.full_like(PIXELS, 3)}, "a positive std for each"),
        ({"y_test": np.array([{}, {}])}, "plain arrays"),
    ],
)
def test_wrong_arrays_are_named(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        load(tmp_path, **changes)
    assert "\n" not in str(caught.value)


def test_no_npz_at_all(tmp_path: Path) -> None:
    path = save(tmp_path / "data.npz")
    one_array = io.BytesIO()
    np.save(one_array, PIXELS)
    for content in (b"", b"text", path.read_bytes()[:-60], one_array.getvalue()):
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"data\.npz cannot be read as a \.npz"):
            npz(str(path))
