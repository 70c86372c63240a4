# SPDX-License-Identifier: Apache-2.0
"""`kill -9` of the server's process of a real `flwr run`, and `resume-from` after it.

`tests/app/test_kill.py` kills runs of every strategy without the engine, at any call.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
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


@contextmanager
def killed_in_round(engine: Engine, folder: Path, after_round: int, delay: float) -> Iterator[None]:
    """While open: wait for the end of a round and ``delay`` seconds, then kill the server."""
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(0.05):
            if (folder / "metrics.jsonl").exists() and len(
                (folder / "metrics.jsonl").read_bytes().splitlines()
            ) > after_round:
                time.sleep(delay)
                engine.kill_server()
                return

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield
    finally:
        ended.set()
        watcher.join()


@dataclass(frozen=True)
class Killed:
    """A run that was killed after so many rounds, and what went on with it."""

    config: dict[str, Any]
    folder: Path
    after_round: int
    rounds: int
    killed: EngineRun
    resumed: EngineRun


@pytest.fixture(scope="module")
def runs(engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Killed]:
    """By strategy; one is resumed in the same `flwr run` in which the next one is killed."""
    folder = tmp_path_factory.mktemp("killed")
    config = {
        **CONFIG,
        "data-root": str(write_pictures(folder / "pictures.npz")),
        "num-server-rounds": ROUNDS,
    }
    killed: dict[str, tuple[int, int, EngineRun]] = {}
    resuming: dict[str, dict[str, Any]] = {}
    resumed: list[EngineRun] = []
    for strategy in STRATEGIES:
        cut, own = folder / strategy, {**config, "strategy": strategy}
        generator = np.random.default_rng([9, len(strategy)])
        after_round, delay = int(generator.integers(2, 10)), float(generator.uniform(0, 1))
        parts = {**resuming, "killed": {**own, "output-dir": str(cut)}}
        with killed_in_round(engine, cut, after_round, delay):
            done = engine.run_parts(parts, supernodes=CLIENTS)
        killed[strategy] = after_round, len(rows(cut)) - 1, done.part("killed")
        resumed += [done.part("resumed")] if resuming else []
        resuming = {"resumed": {**own, "resume-from": str(cut)}}
    resumed.append(engine.run_parts(resuming, supernodes=CLIENTS).part("resumed"))
    return {
        strategy: Killed(
            {**config, "strategy": strategy}, folder / strategy, *killed[strategy], last
        )
        for strategy, last in zip(STRATEGIES, resumed, strict=True)
    }


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_killed_at_random_and_the_same_in_the_end(
    strategy: str, runs: dict[str, Killed], tmp_path: Path
) -> None:
    it = runs[strategy]
    assert it.killed.status == "finished:failed"
    assert "Final model digest" not in it.killed.log
    assert it.after_round <= it.rounds < ROUNDS
    assert it.resumed.status == "finished:completed", it.resumed.log[-3000:]
    # In process, which tests/engine/test_flwr_run.py shows to be the same.
    whole = run_in_process({**it.config, "output-dir": str(tmp_path / "whole")})
    assert it.resumed.digest == whole.digest
    assert_same_artifacts(it.folder, whole.directory)
