# SPDX-License-Identifier: Apache-2.0
"""`kill -9` of the server's process of a real `flwr run`, and `resume-from` after it.

`tests/app/test_kill.py` kills runs of every strategy without the engine, at any call.
"""

from __future__ import annotations

import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.engine.harness import Engine, EngineRun
from tests.runs import (
    CLIENTS,
    CONFIG,
    assert_same_artifacts,
    rows,
    run_in_process,
    write_pictures,
)

pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.timeout(1800)]

ROUNDS = 20
STRATEGIES = ("fedfusion", "ifca")


def kill_in(run: Future[EngineRun], engine: Engine, folder: Path, seed: list[int]) -> None:
    """Kill the server at a random moment after one of the first rounds."""
    generator = np.random.default_rng(seed)
    after_round, delay = int(generator.integers(2, 10)), float(generator.uniform(0, 1))
    metrics = folder / "metrics.jsonl"
    while not metrics.exists() or len(metrics.read_bytes().splitlines()) <= after_round:
        assert not run.done(), run.result().log[-3000:]
        time.sleep(0.05)
    time.sleep(delay)
    engine.kill_server()
    assert after_round <= len(rows(folder)) - 1 < ROUNDS


def test_killed_at_random_and_the_same_in_the_end(engine: Engine, tmp_path: Path) -> None:
    """A strategy's run is resumed in the same `flwr run` in which the next one's is killed.

    At once: Flower takes a minute to see that a server is gone.
    """
    pictures = write_pictures(tmp_path / "pictures.npz")
    shared = {**CONFIG, "data-root": str(pictures), "num-server-rounds": ROUNDS}
    runs, resume = [], dict[str, dict[str, Any]]()
    with ThreadPoolExecutor() as pool:
        for strategy in STRATEGIES:
            config, cut = {**shared, "strategy": strategy}, tmp_path / strategy
            parts = {**resume, "killed": {**config, "output-dir": str(cut)}}
            runs.append(pool.submit(engine.run_parts, parts, supernodes=CLIENTS))
            kill_in(runs[-1], engine, cut, seed=[9, len(strategy)])
            resume = {"resumed": {**config, "resume-from": str(cut)}}
        runs.append(pool.submit(engine.run_parts, resume, supernodes=CLIENTS))
    done = [run.result() for run in runs]
    assert [run.status for run in done] == ["finished:failed"] * 2 + ["finished:completed"]
    for strategy, killed, resumed in zip(STRATEGIES, done, done[1:], strict=False):
        assert "Final model digest" not in killed.part("killed").log
        last = resumed.part("resumed")
        assert last.status == "finished:completed", last.log[-3000:]
        # In process, which tests/engine/test_flwr_run.py shows to be the same.
        whole = tmp_path / f"{strategy}-whole"
        config = {**shared, "strategy": strategy, "output-dir": str(whole)}
        assert last.digest == run_in_process(config).digest
        assert_same_artifacts(tmp_path / strategy, whole)
