# SPDX-License-Identifier: Apache-2.0
"""Image folders: what is read, and one clear sentence for each way to break one."""

from __future__ import annotations

import os
import shutil
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fedfusion_flwr.data import imagefolder as module
from fedfusion_flwr.data.augmentation import CROP_AND_FLIP
from fedfusion_flwr.data.dataset import DataError, FederatedData
from fedfusion_flwr.data.imagefolder import imagefolder, pixel_moments
from fedfusion_flwr.data.roots import moments_lines
from tests.data.files import SHARED, image, write_tree

pytestmark = pytest.mark.usefixtures("cache")
Change = Callable[[Path], object]


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    return write_tree(tmp_path / "tree")


def load(tree: Path) -> FederatedData:
    """Past the registry, which remembers what it loaded."""
    return imagefolder(str(tree))


def test_colour_images(tree: Path) -> None:
    data = load(tree)
    assert data.x_train.shape == (4, 3, 4, 5)
    assert data.x_train[:, 2, 3, 4].tolist() == [0, 10, 20, 30]
    assert data.y_train.tolist() == [0, 0, 1, 1]
    assert data.y_test.tolist() == [0, 1]
    assert data.x_test[:, 0, 0, 0].tolist() == [0, 20]
    assert data.classes == ("cat", "dog")
    assert data.augmentation == CROP_AND_FLIP
    # Of 0, 10, 20, 30: mean 15, variance (225 + 25 + 25 + 225) / 4 = 125.
    assert data.mean == pytest.approx([15 / 255] * 3)
    assert data.std == pytest.approx([125**0.5 / 255] * 3)


def test_channels_are_red_green_blue(tree: Path) -> None:
    Image.new("RGB", (5, 4), (1, 2, 3)).save(tree / "test" / "cat" / "0.png")
    assert load(tree).x_test[0, :, 0, 0].tolist() == [1, 2, 3]


def test_grey_only_if_all_are(tmp_path: Path) -> None:
    tree = write_tree(tmp_path / "grey", mode="L")
    data = load(tree)
    assert data.x_train.shape == (4, 1, 4, 5)
    assert data.mean == pytest.approx([15 / 255])
    image(7).save(tree / "test" / "dog" / "0.png")
    mixed = load(tree)
    assert mixed.input_shape == (3, 4, 5)
    assert mixed.x_train[3, :, 0, 0].tolist() == [30, 30, 30]


def test_suffixes_in_any_case_and_hidden_files(tree: Path) -> None:
    image(40).save(tree / "train" / "cat" / "2.JPG", format="jpeg")
    image(50).save(tree / "train" / "cat" / "3.Jpeg", format="jpeg")
    for place in ("", "train", "train/dog"):
        (tree / place / ".DS_Store").write_text("hidden")
    assert load(tree).y_train.tolist() == [0, 0, 0, 0, 1, 1]


def test_classes_file_fixes_order_and_permits_absent_classes(tree: Path) -> None:
    (tree / "classes.txt").write_text("fox\ndog\n\n  cat \n", encoding="utf-8")
    data = load(tree)
    assert data.classes == ("fox", "dog", "cat")
    assert data.y_train.tolist() == [2, 2, 1, 1]
    shutil.rmtree(tree / "train" / "cat")
    shutil.rmtree(tree / "test" / "dog")
    data = load(tree)
    assert (data.y_train.tolist(), data.y_test.tolist()) == ([1, 1], [2])
    assert data.num_classes == 3


def test_moments_file_wins(tree: Path) -> None:
    mean, std = (0.1, 1 / 3, 0.5), (0.25, 1e-3, 2.0)
    (tree / "moments.txt").write_text("\n".join(moments_lines(mean, std)))
    data = load(tree)
    assert (data.mean, data.std) == (mean, std)
    (tree / "moments.txt").write_text("0.5\n0.5\n")
    with pytest.raises(DataError, match="a mean and a positive std for each"):
        load(tree)
    for text in ("0.1 0.2 0.3", "a b c\n1 2 3", "1\n2\n3"):
        (tree / "moments.txt").write_text(text)
        with pytest.raises(DataError, match=r"moments\.txt must hold two lines"):
            load(tree)


def test_second_load_decodes_nothing(
    tree: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = load(tree)
    assert len(list(cache.iterdir())) == 1
    monkeypatch.setattr(module, "_decode", None)
    again = load(tree)
    assert again.x_train.equal(first.x_train)
    assert (again.mean, again.std) == (first.mean, first.std)


def rewritten(tree: Path, *, suffix: bytes = b"", later: int = 1) -> None:
    path = tree / "train" / "cat" / "0.png"
    content, times = path.read_bytes(), path.stat()
    path.write_bytes(content + suffix)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns + later))


@pytest.mark.parametrize(
    "change",
    [
        rewritten,
        partial(rewritten, suffix=b"\0", later=0),
        lambda tree: (tree / "train/cat/0.png").rename(tree / "train/cat/00.png"),
        lambda tree: (tree / "train/cat/0.png").unlink(),
    ],
    ids=["time", "size", "name", "removed"],
)
def test_every_change_of_a_file_decodes_again(tree: Path, cache: Path, change: Change) -> None:
    load(tree)
    change(tree)
    load(tree)
    assert len(list(cache.iterdir())) == 2


# --- broken trees ---------------------------------------------------------------------------------


def remove(*names: str) -> Change:
    return lambda tree: [shutil.rmtree(tree / name) for name in names]


def write(name: str, content: bytes) -> Change:
    return lambda tree: (tree / name).write_bytes(content)


def save(name: str) -> Change:
    return lambda tree: image().save(tree / name)


def truncated_jpg(tree: Path) -> None:
    path = tree / "train" / "dog" / "b.jpg"
    noise = np.random.default_rng(0).integers(256, size=(4, 5, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[:-40])


def damaged_png(tree: Path) -> None:
    path = tree / "test" / "dog" / "0.png"
    content = bytearray(path.read_bytes())
    content[45] ^= 255
    path.write_bytes(content)


def other_sizes(tree: Path) -> None:
    image(size=(6, 4)).save(tree / "train" / "dog" / "1.png")
    image(size=(7, 4)).save(tree / "test" / "cat" / "0.png")


def sixteen_bits(tree: Path) -> None:
    Image.fromarray(np.full((4, 5), 300, np.uint16)).save(tree / "train" / "cat" / "1.png")


BROKEN: dict[str, Change] = {
    "tree/train is not a folder; .*with both train/ and test/": remove("train"),
    "tree/test is not a folder": remove("test"),
    "tree/train holds no class folder": remove("train/cat", "train/dog"),
    "tree/train holds one class only": remove("train/dog", "test/dog"),
    "train/cow is an empty class folder": lambda tree: (tree / "train/cow").mkdir(),
    "train/dog/a.jpg cannot be decoded": write("train/dog/a.jpg", b"no picture"),
    "train/dog/b.jpg cannot be decoded .*truncated": truncated_jpg,
    "train/dog/a.png cannot be read .*No such file": lambda tree: (
        tree / "train/dog/a.png"
    ).symlink_to(tree / "nowhere.png"),
    "test/dog/0.png cannot be decoded": damaged_png,
    "Class 'dog' has no folder in .*tree/test": lambda tree: (tree / "test/dog").rename(
        tree / "test/wolf"
    ),
    "Class 'aardvark' has no folder in .*tree/train": lambda tree: shutil.copytree(
        tree / "test/dog", tree / "test/aardvark"
    ),
    "train/dog/1.png is 6x4 pixels, but .*train/cat/0.png is 5x4: .*not resized": other_sizes,
    "train/x.png lies directly in train/": save("train/x.png"),
    "train/cat/x.gif is not a .jpg, .jpeg or .png": save("train/cat/x.gif"),
    "train/cat/more.png is not a .jpg": lambda tree: (tree / "train/cat/more.png").mkdir(),
    "train/cat/1.png has pixels of mode I;16; save it with 8 bits": sixteen_bits,
    "train/dog is a class that classes.txt lacks": write("classes.txt", b"cat\nfox\n"),
    "classes.txt names class 'cat' twice": write("classes.txt", b"cat\ndog\ncat\n"),
    "classes.txt must name at least two classes": write("classes.txt", b"cat\n"),
    "classes.txt cannot be read as UTF-8": write("classes.txt", b"\xff\xfe\xff"),
}


@pytest.mark.parametrize("message", BROKEN)
def test_broken_tree_is_one_clear_sentence(tree: Path, cache: Path, message: str) -> None:
    BROKEN[message](tree)
    with pytest.raises(DataError, match=message) as caught:
        load(tree)
    assert "\n" not in str(caught.value)
    assert not cache.exists()


def test_moments_over_many_pieces() -> None:
    pixels = np.random.default_rng(0).integers(256, size=(1200, 2, 3, 2), dtype=np.uint8)
    mean, std = pixel_moments(pixels)
    np.testing.assert_allclose(mean, pixels.mean((0, 2, 3)) / 255)
    np.testing.assert_allclose(std, pixels.std((0, 2, 3)) / 255)


def test_real_photographs(tmp_path: Path) -> None:
    """Some of CIFAR-10's images, as JPEG."""
    archive = SHARED / "cifar10-images.zip"
    if not archive.exists():
        pytest.skip("no cifar10-images.zip in FEDFUSION_SHARED_DATA")
    with zipfile.ZipFile(archive) as files:
        wanted = [
            f"cifar10/{split}/{name}/{number:04}.jpg"
            for split in ("train", "test")
            for name in ("cat", "ship", "truck")
            for number in range(40)
        ]
        files.extractall(tmp_path, wanted)
    data = load(tmp_path / "cifar10")
    assert data.x_train.shape == (120, 3, 32, 32)
    assert data.classes == ("cat", "ship", "truck")
    assert data.y_test.bincount().tolist() == [40] * 3
    # Near the published moments of all of CIFAR-10.
    assert data.mean == pytest.approx([0.49, 0.48, 0.45], abs=0.06)
    with Image.open(tmp_path / "cifar10/train/ship/0039.jpg") as last:
        assert data.x_train[79].permute(1, 2, 0).numpy().tolist() == np.asarray(last).tolist()
