# SPDX-License-Identifier: Apache-2.0
"""The final models of every strategy, frozen: a change that must not change results changes none.

``digests.json`` holds, by kind of processor, the digests of the served models, and a sketch of each
for processors that round differently. After a change that is meant to change them,
``python -m tests.app.test_digests`` rewrites the table of this processor.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file

from fedfusion_flwr.experiments.rows import instructions
from fedfusion_flwr.strategies import registry
from tests.runs import Killed, assert_same_artifacts, go_dying

pytestmark = pytest.mark.rounding

TABLE = Path(__file__).with_name("digests.json")
TOLERANCE = 0.01
"""Relative to a model's norm: rounding moves a model by less than half of this in six rounds."""

CLIENTS = 6
CONFIG: dict[str, Any] = {
    "dataset": "mnist-5k",
    "train-examples": 600,
    "test-examples": 200,
    "num-clients": CLIENTS,
    "num-server-rounds": 6,
    "planted-components": 3,
    "checkpoint-every": 1,
    "evaluate-every": 2,
    "num-clusters": 2,
    "cluster-round": 2,
    "warmup-rounds": 1,
    "pretrain-steps": 3,
    "pretrain-clients": 3,
    "num-components": 4,
}
COHORTS = {"all": 1.0, "some": 0.5}
QUICK = ("fedfusion", "fesem", "fedma")
"""The three with the most state; -m slow runs the others."""


def sketch(folder: Path) -> list[float]:
    """The model along twelve random directions, in units of its norm, and that norm."""
    state = load_file(folder / "final_model.safetensors")
    flat = np.concatenate([state[key].double().flatten().numpy() for key in sorted(state)])
    norm = float(np.linalg.norm(flat))
    directions = np.random.default_rng(0).standard_normal((12, flat.size))
    return [norm, *(directions @ flat / norm).tolist()]


def runs_of(strategy: str, folder: Path) -> Iterator[tuple[str, Path, str]]:
    """Run with all clients and with some; the latter is also killed in round 4 and resumed."""
    for name, fraction in COHORTS.items():
        config = CONFIG | {"strategy": strategy, "fraction-train": fraction}
        outcome = go_dying(folder / name, **config)
        yield name, folder / name, outcome.digest
    with pytest.raises(Killed):
        go_dying(folder / "cut", dies_in=4, **config)
    # Its nodes have other ids, and its replies come in another order.
    resumed = go_dying(folder / "cut", seed=1, **config, **{"resume-from": str(folder / "cut")})
    assert resumed.digest == outcome.digest
    assert resumed.directory == folder / "cut"
    assert_same_artifacts(folder / "cut", folder / name)


@pytest.mark.parametrize(
    "strategy",
    [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in registry()],
)
def test_every_strategy_ends_with_the_frozen_models(strategy: str, tmp_path: Path) -> None:
    table = json.loads(TABLE.read_text(encoding="utf-8"))
    for name, folder, digest in runs_of(strategy, tmp_path):
        known = {digests[f"{strategy}, {name}"] for digests in table["digests"].values()}
        if digest in known:
            continue
        frozen, found = table["sketches"][f"{strategy}, {name}"], sketch(folder)
        assert found[0] == pytest.approx(frozen[0], rel=TOLERANCE)
        np.testing.assert_allclose(found[1:], frozen[1:], atol=3 * TOLERANCE)


def freeze() -> None:
    """Write the digests of this processor, and sketches where they are missing."""
    table = json.loads(TABLE.read_text(encoding="utf-8")) if TABLE.exists() else {}
    digests: dict[str, str] = {}
    for strategy in registry():
        with tempfile.TemporaryDirectory() as folder:
            for name, path, digest in runs_of(strategy, Path(folder)):
                digests[f"{strategy}, {name}"] = digest
                table.setdefault("sketches", {})[f"{strategy}, {name}"] = [
                    round(value, 4) for value in sketch(path)
                ]
    table.setdefault("digests", {})[instructions()] = digests
    TABLE.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(freeze())
