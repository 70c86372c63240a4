# SPDX-License-Identifier: Apache-2.0
"""The registry: the embedded digits, parts of a data set, and loaders of the user's own."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fedfusion_flwr.config import DATASETS, RunConfig
from fedfusion_flwr.data import DataError, FederatedData, data_for, load_data, sources

MODULE = '''
import torch
from fedfusion_flwr.data import DataError, FederatedData


def stripes(options):
    """Two classes: upright stripes as wide as text_length says, or none."""
    x = torch.zeros(8, 1, 6, 6)
    x[::2, :, :, : options.text_length] = 1
    y = torch.arange(8) % 2
    return FederatedData(f"stripes in {options.root}", x, y, x[:2], y[:2], num_classes=2)


def plain():
    x, y = torch.zeros(4, 1, 6, 6), torch.arange(4)
    return FederatedData("plain", x, y, x, y, num_classes=4)


def wrong_type():
    return [1, 2]


def refuses():
    raise DataError("the disc is not in the drive")


def fails():
    return {}["no such key"]
'''


@pytest.fixture(scope="module")
def digits() -> FederatedData:
    return load_data("mnist-5k")


def labelled(data: FederatedData) -> set[tuple[bytes, int]]:
    """Every training image as its bytes, with its label."""
    pairs = zip(data.x_train, data.y_train, strict=True)
    return {(x.numpy().tobytes(), int(y)) for x, y in pairs}


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


def test_every_data_set_is_documented() -> None:
    text = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
    for name in DATASETS:
        assert f"| `{name}`" in text


def test_part_of_a_data_set(digits: FederatedData) -> None:
    part = data_for(RunConfig(train_examples=300, test_examples=50))
    assert part is data_for(RunConfig(train_examples=300, test_examples=50, seed=7))
    assert (len(part.x_train), len(part.x_test)) == (300, 50)
    assert data_for(RunConfig(train_examples=300)).x_test.equal(digits.x_test)
    # Sorted by class as the whole set is, with every class, each image with its own label.
    assert part.y_train.tolist() == sorted(part.y_train.tolist())
    assert set(part.y_train.tolist()) == set(range(10))
    drawn = labelled(part)
    assert len(drawn) == 300
    assert drawn < labelled(digits)


def test_more_than_there_is_is_refused() -> None:
    message = r"`test-examples` is 1001, but data set 'mnist-5k' has 1000"
    with pytest.raises(DataError, match=message):
        data_for(RunConfig(test_examples=1001))


# --- dataset = "module:function"


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module that was never imported."""
    name = f"data_of_{tmp_path.name}"
    (tmp_path / f"{name}.py").write_text(MODULE, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    return name


def test_a_function_gets_the_options(own: str) -> None:
    data = load_data(f"{own}:stripes", "/some/where", text_length=3)
    assert isinstance(data, FederatedData)
    assert data.name == "stripes in /some/where"
    assert data.x_train[0, 0, 0].tolist() == [1, 1, 1, 0, 0, 0]


def test_a_function_without_arguments(own: str) -> None:
    assert load_data(f"{own}:plain").num_classes == 4


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("wrong_type", "must return a FederatedData, not list"),
        ("refuses", "the disc is not in the drive"),
        ("fails", "failed: KeyError: 'no such key'"),
        ("missing", r"data_of_\w+\.py has no 'missing'"),
    ],
)
def test_what_goes_wrong_in_the_function(own: str, function: str, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        load_data(f"{own}:{function}")
    assert "\n" not in str(caught.value)
