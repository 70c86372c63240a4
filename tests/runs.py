# SPDX-License-Identifier: Apache-2.0
"""Small runs in one process, single messages to a client, and a comparison of two runs."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, RecordDict
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from benchmarks.in_process import write_pictures
from client_app import app as client_app
from fedfusion_flwr import protocol
from fedfusion_flwr.app.server import RunOutcome, run
from fedfusion_flwr.federation.in_process_grid import InProcessGrid
from fedfusion_flwr.fusion import NormalizationStatistics
from tests.support import assert_identical

__all__ = [
    "CLIENTS",
    "CONFIG",
    "ROUNDS",
    "ask_client",
    "assert_same_artifacts",
    "rows",
    "run_in_process",
    "state_of",
    "statistics_of",
    "write_pictures",
]

ROUNDS = 6
CLIENTS = 4
CONFIG: dict[str, Any] = {
    "dataset": "npz",
    "num-clients": CLIENTS,
    "num-server-rounds": ROUNDS,
    "partition": "shards",
    "validation-fraction": 0.2,
    "checkpoint-every": 1,
    "evaluate-every": 2,
    "fraction-train": 0.75,
    "num-clusters": 2,
    "cluster-round": 2,
    "warmup-rounds": 1,
    "pretrain-steps": 2,
    "pretrain-clients": 1,
    "vae-steps": 5,
    "vae-refit-steps": 2,
    "num-components": 3,
}
"""Every strategy's keys, so that each does all that it can within six rounds."""


def run_in_process(config: dict[str, Any], seed: int = 0, clients: int | None = None) -> RunOutcome:
    """One run without Ray; ``seed`` decides the node ids and the order of replies.

    ``clients`` are connected, by default ``num-clients``.
    """
    clients = config.get("num-clients", 10) if clients is None else clients
    grid = InProcessGrid(client_app, clients, config, seed=seed, shuffle_replies=True)
    return run(grid, Context(1, 0, {}, RecordDict(), config))


def ask_client(
    config: dict[str, Any],
    node: dict[str, Any],
    arrays: ArrayRecord,
    kind: str,
    sent: dict[str, Any],
) -> Message:
    """The reply of one client to one message; ``sent`` are the settings in the message."""
    grid = InProcessGrid(client_app, 0, config)
    content = RecordDict({"arrays": arrays, "config": ConfigRecord(sent)})
    (reply,) = grid.send_and_receive([Message(content, grid.add_node(node), kind)])
    return reply


def state_of(reply: Message) -> dict[str, Tensor]:
    """The model in a train reply."""
    return protocol.state_from_record(reply.content.array_records["arrays"])


def statistics_of(reply: Message) -> NormalizationStatistics:
    """The normalization record in a reply."""
    return protocol.statistics_from_record(reply.content.array_records["normalization"])


class Killed(BaseException):
    """Ends a run as kill -9 would, without any cleanup."""


class DyingGrid(InProcessGrid):
    """Dies before the training of the given round."""

    def __init__(self, config: dict[str, Any], dies_in: int | None = None, seed: int = 0) -> None:
        clients = config["num-clients"]
        super().__init__(client_app, clients, config, seed=seed, shuffle_replies=True)
        self.dies_in = dies_in

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        messages = list(messages)
        rounds = {message.content.config_records["config"]["server-round"] for message in messages}
        if self.dies_in in rounds:
            raise Killed
        return super().send_and_receive(messages, timeout=timeout)


def go_dying(
    folder: Path, *, dies_in: int | None = None, seed: int = 0, **config: Any
) -> RunOutcome:
    """One run, killed in the given round; ``resume-from`` resumes an earlier one."""
    if "resume-from" not in config:
        config["output-dir"] = str(folder)
    grid = DyingGrid(config, dies_in, seed)
    return run(grid, Context(1, 0, {}, RecordDict(), config))


def rows(folder: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    """The rows of a JSON-lines file, without clocks and node ids, which differ in every run."""
    lines = (folder / name).read_text(encoding="utf-8").splitlines()
    never = ("seconds", "node", "train-seconds", "train-started")
    return [{k: v for k, v in json.loads(line).items() if k not in never} for line in lines]


def assert_same_artifacts(folder: Path, other: Path) -> None:
    """Two runs have written the same files, except for clocks and node ids."""
    for name in ("metrics.jsonl", "clients.jsonl"):
        assert rows(folder, name) == rows(other, name)
    assert (folder / "summary.json").read_text() == (other / "summary.json").read_text()
    for name in ("final_model", "final_models", "best_model"):
        files = [f / f"{name}.safetensors" for f in (folder, other)]
        assert files[0].exists() == files[1].exists()
        if files[0].exists():
            assert_identical(*map(load_file, files))
            assert _metadata(files[0]) == _metadata(files[1])
    archives = [f / "fusion.npz" for f in (folder, other)]
    assert archives[0].exists() == archives[1].exists()
    if archives[0].exists():
        with np.load(archives[0]) as one, np.load(archives[1]) as two:
            assert set(one.files) == set(two.files)
            for name in one.files:
                np.testing.assert_array_equal(one[name], two[name])


def _metadata(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as stored:
        return dict(stored.metadata())
