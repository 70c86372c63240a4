# SPDX-License-Identifier: Apache-2.0
"""`kill -9` of the server's process of a real `flwr run`, and `resume-from` after it.

`tests/app/test_kill.py` kills runs of every strategy without the engine, at any call.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.engine.harness import Engine
from tests.runs import (
    CLIENTS,
    CONFIG,
    assert_same_artifacts,
    rows,
    run_in_process,
    write_pictures,
)

pytestmark = [pytest.mark.engine, pytest.mark.slow]

ROUNDS = 20


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


@pytest.mark.parametrize("strategy", ["fedfusion", "ifca"])
def test_killed_at_random_and_the_same_in_the_end(
    strategy: str, engine: Engine, tmp_path: Path
) -> None:
    pictures = write_pictures(tmp_path / "pictures.npz")
    config: dict[str, Any] = {
        **CONFIG,
        "data-root": str(pictures),
        "num-server-rounds": ROUNDS,
        "strategy": strategy,
    }
    # In process, which tests/engine/test_flwr_run.py shows to be the same.
    whole = run_in_process({**config, "output-dir": str(tmp_path / "whole")})
    cut = tmp_path / "cut"
    generator = np.random.default_rng([9, len(strategy)])
    after_round, delay = int(generator.integers(2, 10)), float(generator.uniform(0, 1))
    with killed_in_round(engine, cut, after_round, delay):
        killed = engine.run({**config, "output-dir": str(cut)}, supernodes=CLIENTS)
    assert killed.status == "finished:failed"
    assert "Final model digest" not in killed.log
    done = len(rows(cut, "metrics.jsonl")) - 1
    assert after_round <= done < ROUNDS
    resumed = engine.run({**config, "resume-from": str(cut)}, supernodes=CLIENTS)
    assert resumed.status == "finished:completed", resumed.log[-3000:]
    assert resumed.digest == whole.digest
    assert_same_artifacts(cut, whole.directory)
