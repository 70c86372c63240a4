# SPDX-License-Identifier: Apache-2.0
"""The deep models through `flwr run` on image files."""

from __future__ import annotations

import math
import os
import zipfile
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file

from fedfusion_flwr.models import build_model
from tests.engine.harness import ROOT, Engine, EngineRun

pytestmark = [pytest.mark.engine, pytest.mark.slow]

CLIENTS = 4
CONFIG: dict[str, Any] = {
    "num-server-rounds": 2,
    "num-clients": CLIENTS,
    "partition": "iid",
    "dataset": "imagefolder",
    "batch-size": 5,
}
CHANNELS = {"resnet18": 4800, "mobilenetv2": 17056, "densenet121": 41824}


def cifar_zip() -> Path:
    shared = os.environ.get("FEDFUSION_SHARED_DATA")
    folder = Path(shared) if shared else ROOT.parent / "shared" / "data"
    return folder / "cifar10-images.zip"


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four classes by colour: ten training and four test images of 32x32 noisy pixels each."""
    root = tmp_path_factory.mktemp("pictures")
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


def check(done: EngineRun, channels: int) -> None:
    assert done.status == "finished:completed", done.log[-3000:]
    rows = done.metrics()
    assert [row["replies-valid"] for row in rows[1:]] == [CLIENTS] * 2
    assert all(row["fusion-fallback"] == 0 for row in rows[1:])
    assert all(math.isfinite(row["train-loss"]) for row in rows[1:])
    assert all(0 <= row["global-accuracy"] <= 1 for row in rows)
    with np.load(done.directory / "fusion.npz") as fusion:
        assert fusion["components"].shape[2] == 4 * channels


@pytest.mark.parametrize("name", sorted(CHANNELS))
def test_deep_models_run_on_an_image_folder(engine: Engine, pictures: Path, name: str) -> None:
    config = {**CONFIG, "data-root": str(pictures), "model": name}
    done = engine.run(config, supernodes=CLIENTS)
    check(done, CHANNELS[name])
    built = build_model(name, (3, 32, 32), 4, seed=0).state_dict()
    final = load_file(done.directory / "final_model.safetensors")
    assert {key: (v.shape, v.dtype) for key, v in final.items()} == {
        key: (v.shape, v.dtype) for key, v in built.items()
    }


IN_OTHER_WAYS = {
    "mobilenetv2": {
        "normalization": "group",
        "statistics-source": "probe",
        "precision": "bf16",
    }
}


@pytest.mark.skipif(
    not cifar_zip().exists(), reason="no cifar10-images.zip in FEDFUSION_SHARED_DATA"
)
@pytest.mark.parametrize("name", sorted(CHANNELS))
def test_cifar_10(engine: Engine, tmp_path: Path, name: str) -> None:
    """Twelve training and two test images of each class."""
    with zipfile.ZipFile(cifar_zip()) as archive:
        taken: dict[PurePosixPath, int] = {}
        for member in sorted(archive.namelist()):
            path = PurePosixPath(member)
            most = 12 if path.parts[1:2] == ("train",) else 2
            if path.suffix == ".jpg" and taken.get(path.parent, 0) < most:
                taken[path.parent] = taken.get(path.parent, 0) + 1
                archive.extract(member, tmp_path)
    assert len(taken) == 20
    config = {
        **CONFIG,
        "data-root": str(tmp_path / "cifar10"),
        "model": name,
        **IN_OTHER_WAYS.get(name, {}),
    }
    check(engine.run(config, supernodes=CLIENTS), CHANNELS[name])
