# SPDX-License-Identifier: Apache-2.0
"""Image folders, Fashion-MNIST's files and tweets, with the models for them, through `flwr run`.

They are parts of one run. The real data are used where they are.
"""

from __future__ import annotations

import csv
import gzip
import math
import os
import zipfile
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file

from fedfusion_flwr.models import build_model
from tests.data import tweets
from tests.data.files import SHARED, idx_bytes
from tests.engine.harness import Engine, EngineRun

pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.timeout(1800)]

CLIENTS = 4
FOUR: dict[str, Any] = {"num-server-rounds": 2, "num-clients": CLIENTS, "partition": "iid"}
FOLDER: dict[str, Any] = {**FOUR, "dataset": "imagefolder", "batch-size": 5}
FASHION: dict[str, Any] = {**FOUR, "dataset": "fashion-mnist"}
TWEETS: dict[str, Any] = {
    **FOUR,
    "dataset": "sentiment140",
    "model": "bilstm",
    "batch-size": 64,
    "learning-rate": 0.2,
    "average-decay": 0.0,
}
CHANNELS = {"resnet18": 4800, "mobilenetv2": 17056, "densenet121": 41824}
IN_OTHER_WAYS: dict[str, Any] = {
    "normalization": "group",
    "statistics-source": "probe",
    "precision": "bf16",
}
"""How MobileNetV2 trains on CIFAR-10."""

CIFAR = SHARED / "cifar10-images.zip"
needs_cifar = pytest.mark.skipif(
    not CIFAR.exists(), reason="no cifar10-images.zip in FEDFUSION_SHARED_DATA"
)
REAL_FASHION = Path(os.environ.get("FEDFUSION_FASHION_MNIST", "/usr/share/datasets/fashion-mnist"))
FASHION_IS_HERE = (REAL_FASHION / "train-images-idx3-ubyte.gz").exists()
needs_fashion = pytest.mark.skipif(
    not FASHION_IS_HERE,
    reason="no Fashion-MNIST: install Debian's package or set FEDFUSION_FASHION_MNIST",
)


def write_colours(root: Path) -> Path:
    """Four classes by colour: ten training and four test images of 32x32 noisy pixels each."""
    generator = np.random.default_rng(0)
    colours = {"blue": (0, 0, 255), "green": (0, 255, 0), "red": (255, 0, 0), "white": (255,) * 3}
    for name, colour in colours.items():
        for split, count in (("train", 10), ("test", 4)):
            folder = root / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                noise = generator.integers(0, 256, (32, 32, 3))
                pixels = (noise + np.array(colour)) // 2
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{number}.png")
    return root


def extract_cifar(root: Path) -> Path:
    """Eight training and two test images of each class."""
    with zipfile.ZipFile(CIFAR) as archive:
        taken: dict[PurePosixPath, int] = {}
        for member in sorted(archive.namelist()):
            path = PurePosixPath(member)
            most = 8 if path.parts[1:2] == ("train",) else 2
            if path.suffix == ".jpg" and taken.get(path.parent, 0) < most:
                taken[path.parent] = taken.get(path.parent, 0) + 1
                archive.extract(member, root)
    assert len(taken) == 20
    return root / "cifar10"


def write_stripes(root: Path) -> Path:
    """Write images of 28x28 pixels; those of class c have a bright stripe at rows 2c and 2c + 1."""
    root.mkdir()
    generator = np.random.default_rng(0)
    for prefix, count in (("train", 800), ("t10k", 100)):
        labels = np.arange(count) % 10
        pixels = generator.integers(0, 60, (count, 28, 28))
        for image, label in zip(pixels, labels, strict=True):
            image[2 * label : 2 * label + 2] = 255
        (root / f"{prefix}-images-idx3-ubyte").write_bytes(idx_bytes(pixels))
        (root / f"{prefix}-labels-idx1-ubyte").write_bytes(idx_bytes(labels))
    return root


@pytest.fixture(scope="module")
def everything(engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> EngineRun:
    root = tmp_path_factory.mktemp("data")
    parts: dict[str, dict[str, Any]] = {}
    colours = str(write_colours(root / "colours"))
    for name in CHANNELS:
        parts[f"colours-{name}"] = {**FOLDER, "data-root": colours, "model": name}
    stripes = str(write_stripes(root / "stripes"))
    parts["stripes"] = {**FASHION, "data-root": stripes, "batch-size": 8}
    toys = tweets.write_tweets(root / "tweets.csv.gz", tweets.toy_rows(2000, users=30))
    parts["toy-tweets"] = {**TWEETS, "data-root": str(toys), "partition": "user"}
    if CIFAR.exists():
        images = str(extract_cifar(root))
        for name in CHANNELS:
            ways = IN_OTHER_WAYS if name == "mobilenetv2" else {}
            parts[f"cifar-{name}"] = {**FOLDER, "data-root": images, "model": name, **ways}
    if FASHION_IS_HERE:
        # Nine tenths are held out, so that a tenth is trained.
        keys = {"data-root": str(REAL_FASHION), "validation-fraction": 0.9}
        parts["real-fashion"] = {**FASHION, **keys}
    if tweets.REAL.exists():
        with gzip.open(tweets.REAL, "rt", encoding="latin-1", newline="") as file:
            real = tweets.write_tweets(root / "real.csv", islice(csv.reader(file), 3000))
        parts["real-tweets"] = {
            **TWEETS,
            "data-root": str(real),
            "batch-size": 32,
            "vocabulary-size": 3000,
            "local-epochs": 3,
            "num-server-rounds": 5,
        }
    return engine.run_parts(parts, supernodes=CLIENTS)


def part(everything: EngineRun, name: str, rounds: int = 2) -> EngineRun:
    """A part in which all clients replied in every round."""
    done = everything.part(name)
    assert done.status == "finished:completed", done.log[-3000:]
    assert [row["replies-valid"] for row in done.metrics()[1:]] == [CLIENTS] * rounds
    assert (done.directory / "final_model.safetensors").exists()
    return done


@pytest.mark.parametrize("name", sorted(CHANNELS))
@pytest.mark.parametrize("images", ["colours", pytest.param("cifar", marks=needs_cifar)])
def test_deep_models_run_on_an_image_folder(everything: EngineRun, images: str, name: str) -> None:
    done = part(everything, f"{images}-{name}")
    rows = done.metrics()
    assert all(row["fusion-fallback"] == 0 for row in rows[1:])
    assert all(math.isfinite(row["train-loss"]) for row in rows[1:])
    assert all(0 <= row["global-accuracy"] <= 1 for row in rows)
    with np.load(done.directory / "fusion.npz") as fusion:
        assert fusion["components"].shape[2] == 4 * CHANNELS[name]
    if images == "colours":
        built = build_model(name, (3, 32, 32), 4, seed=0).state_dict()
        final = load_file(done.directory / "final_model.safetensors")
        assert {key: (v.shape, v.dtype) for key, v in final.items()} == {
            key: (v.shape, v.dtype) for key, v in built.items()
        }


@pytest.mark.parametrize("images", ["stripes", pytest.param("real-fashion", marks=needs_fashion)])
def test_lenet_learns_from_files_in_fashion_mnists_format(
    everything: EngineRun, images: str
) -> None:
    done = part(everything, images)
    rows = done.metrics()
    assert rows[2]["global-accuracy"] > 0.5 > rows[0]["global-accuracy"]
    names = (done.directory / "classes.txt").read_text(encoding="utf-8").split("\n")
    assert names[9] == "Ankle boot"
    if images == "real-fashion":
        assert {row["num-examples"] for row in done.clients()} == {1500}


def test_generated_tweets_by_user(everything: EngineRun) -> None:
    assert part(everything, "toy-tweets").metrics()[2]["global-accuracy"] > 0.95


@tweets.needs_real
def test_real_tweets(everything: EngineRun) -> None:
    # 300 are held out: guessing stays below 0.6 by three standard deviations.
    assert part(everything, "real-tweets", rounds=5).metrics()[-1]["global-accuracy"] > 0.6
