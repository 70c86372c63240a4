# SPDX-License-Identifier: Apache-2.0
"""LeNet on files in Fashion-MNIST's format through `flwr run`: generated and the real 60,000."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.data.files import idx_bytes
from tests.engine.harness import Engine, EngineRun

pytestmark = [pytest.mark.engine, pytest.mark.slow]

CLIENTS = 4
CONFIG: dict[str, Any] = {
    "dataset": "fashion-mnist",
    "num-clients": CLIENTS,
    "num-server-rounds": 2,
    "partition": "iid",
}
REAL = Path(os.environ.get("FEDFUSION_FASHION_MNIST", "/usr/share/datasets/fashion-mnist"))


def write_stripes(folder: Path) -> None:
    """Write images of 28x28 pixels; those of class c have a bright stripe at rows 2c and 2c + 1."""
    generator = np.random.default_rng(0)
    for prefix, count in (("train", 800), ("t10k", 100)):
        labels = np.arange(count) % 10
        pixels = generator.integers(0, 60, (count, 28, 28))
        for image, label in zip(pixels, labels, strict=True):
            image[2 * label : 2 * label + 2] = 255
        (folder / f"{prefix}-images-idx3-ubyte").write_bytes(idx_bytes(pixels))
        (folder / f"{prefix}-labels-idx1-ubyte").write_bytes(idx_bytes(labels))


def check(done: EngineRun, least: float) -> None:
    assert done.status == "finished:completed", done.log[-3000:]
    rows = done.metrics()
    assert [row["replies-valid"] for row in rows[1:]] == [CLIENTS] * 2
    assert rows[2]["global-accuracy"] > least > rows[0]["global-accuracy"]
    assert (done.directory / "classes.txt").read_text(encoding="utf-8").split("\n")[9] == (
        "Ankle boot"
    )


def test_generated_pictures_learn(engine: Engine, tmp_path: Path) -> None:
    write_stripes(tmp_path)
    config = {**CONFIG, "data-root": str(tmp_path), "batch-size": 8}
    check(engine.run(config, supernodes=CLIENTS), 0.5)


@pytest.mark.skipif(
    not (REAL / "train-images-idx3-ubyte.gz").exists(),
    reason="no Fashion-MNIST: install Debian's package or set FEDFUSION_FASHION_MNIST",
)
def test_the_real_sixty_thousand(engine: Engine) -> None:
    """All are read; nine tenths are held out, so that a tenth is trained."""
    config = {**CONFIG, "data-root": str(REAL), "validation-fraction": 0.9}
    done = engine.run(config, supernodes=CLIENTS)
    check(done, 0.5)
    assert {row["num-examples"] for row in done.clients()} == {1500}
