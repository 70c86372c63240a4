# SPDX-License-Identifier: Apache-2.0
"""Image folders: what is read, and one clear sentence for each way to break one."""

from __future__ import annotations

import os
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fedfusion_flwr.data import imagefolder as module
from fedfusion_flwr.data.augmentation import CROP_AND_FLIP
from fedfusion_flwr.data.dataset import DataError, FederatedData
from fedfusion_flwr.data.imagefolder import imagefolder, pixel_moments
from fedfusion_flwr.data.roots import moments_lines
from tests.data.files import image, write_tree

SHARED = Path(os.environ.get("FEDFUSION_SHARED_DATA", Path(__file__).parents[3] / "shared/data"))


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FEDFUSION_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    return write_tree(tmp_path / "tree")


def load(tree: Path) -> FederatedData:
    """Not through the registry, which remembers what it loaded."""
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
        (tree / place / ".DS_Store").write_text("of no account")
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


def test_second_load_decodes_nothing(tree: Path, cache: Path, monkeypatch: object) -> None:
    first = load(tree)
    assert len(list(cache.iterdir())) == 1
    monkeypatch.setattr(module, "_decode", None)  # type: ignore[attr-defined]
    again = load(tree)
    assert again.x_train.equal(first.x_train)
    assert (again.mean, again.std) == (first.mean, first.std)


def rewritten(tree: Path) -> None:
    path = tree / "train" / "cat" / "0.png"
    content, times = path.read_bytes(), path.stat()
    path.write_bytes(content)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns + 1))


def longer(tree: Path) -> None:
    path = tree / "train" / "cat" / "0.png"
    times = path.stat()
    path.write_bytes(path.read_bytes() + b"\0")
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def renamed(tree: Path) -> None:
    (tree / "train" / "cat" / "0.png").rename(tree / "train" / "cat" / "00.png")


def removed(tree: Path) -> None:
    (tree / "train" / "cat" / "0.png").unlink()


@pytest.mark.parametrize("change", [rewritten, longer, renamed, removed])
def test_every_change_of_a_file_decodes_again(
    tree: Path, cache: Path, change: Callable[[Path], None]
) -> None:
    load(tree)
    change(tree)
    load(tree)
    assert len(list(cache.iterdir())) == 2


# --- broken trees ---------------------------------------------------------------------------------


def no_train(tree: Path) -> None:
    shutil.rmtree(tree / "train")


def no_test(tree: Path) -> None:
    shutil.rmtree(tree / "test")


def no_class(tree: Path) -> None:
    shutil.rmtree(tree / "train")
    (tree / "train").mkdir()


def one_class(tree: Path) -> None:
    for split in ("train", "test"):
        shutil.rmtree(tree / split / "dog")


def empty_class(tree: Path) -> None:
    (tree / "train" / "cow").mkdir()


def text_as_jpg(tree: Path) -> None:
    (tree / "train" / "dog" / "a.jpg").write_text("no picture")


def truncated_jpg(tree: Path) -> None:
    path = tree / "train" / "dog" / "b.jpg"
    noise = np.random.default_rng(0).integers(256, size=(4, 5, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[:-40])


def broken_link(tree: Path) -> None:
    (tree / "train" / "dog" / "a.png").symlink_to(tree / "nowhere.png")


def damaged_png(tree: Path) -> None:
    path = tree / "test" / "dog" / "0.png"
    content = bytearray(path.read_bytes())
    content[45] ^= 255
    path.write_bytes(content)


def other_classes(tree: Path) -> None:
    (tree / "test" / "dog").rename(tree / "test" / "wolf")


def class_of_test_only(tree: Path) -> None:
    shutil.copytree(tree / "test" / "dog", tree / "test" / "aardvark")


def other_sizes(tree: Path) -> None:
    image(size=(6, 4)).save(tree / "train" / "dog" / "1.png")
    image(size=(7, 4)).save(tree / "test" / "cat" / "0.png")


def file_in_train(tree: Path) -> None:
    image().save(tree / "train" / "x.png")


def other_format(tree: Path) -> None:
    image().save(tree / "train" / "cat" / "x.gif")


def folder_in_class(tree: Path) -> None:
    (tree / "train" / "cat" / "more.png").mkdir()


def sixteen_bits(tree: Path) -> None:
    pixels = np.full((4, 5), 300, np.uint16)
    Image.fromarray(pixels).save(tree / "train" / "cat" / "1.png")


def unknown_class(tree: Path) -> None:
    (tree / "classes.txt").write_text("cat\nfox\n")


def repeated_class(tree: Path) -> None:
    (tree / "classes.txt").write_text("cat\ndog\ncat\n")


def one_listed_class(tree: Path) -> None:
    (tree / "classes.txt").write_text("cat\n")


def classes_no_text(tree: Path) -> None:
    (tree / "classes.txt").write_bytes(b"\xff\xfe\xff")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (no_train, "tree/train is not a folder; .*with both train/ and test/"),
        (no_test, "tree/test is not a folder"),
        (no_class, "tree/train holds no class folder"),
        (one_class, "tree/train holds one class only"),
        (empty_class, "train/cow is an empty class folder"),
        (text_as_jpg, "train/dog/a.jpg cannot be decoded"),
        (truncated_jpg, "train/dog/b.jpg cannot be decoded .*truncated"),
        (broken_link, "train/dog/a.png cannot be read .*No such file"),
        (damaged_png, "test/dog/0.png cannot be decoded"),
        (other_classes, "Class 'dog' has no folder in .*tree/test"),
        (class_of_test_only, "Class 'aardvark' has no folder in .*tree/train"),
        (other_sizes, "train/dog/1.png is 6x4 pixels, but .*train/cat/0.png is 5x4: .*not resized"),
        (file_in_train, "train/x.png lies directly in train/"),
        (other_format, "train/cat/x.gif is not a .jpg, .jpeg or .png"),
        (folder_in_class, "train/cat/more.png is not a .jpg"),
        (sixteen_bits, "train/cat/1.png has pixels of mode I;16; save it with 8 bits"),
        (unknown_class, "train/dog is a class that classes.txt lacks"),
        (repeated_class, "classes.txt names class 'cat' twice"),
        (one_listed_class, "classes.txt must name at least two classes"),
        (classes_no_text, "classes.txt cannot be read as UTF-8"),
    ],
)
def test_broken_tree_is_one_clear_sentence(
    tree: Path, cache: Path, damage: Callable[[Path], None], message: str
) -> None:
    damage(tree)
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
