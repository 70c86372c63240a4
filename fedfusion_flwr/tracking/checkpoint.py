# SPDX-License-Identifier: Apache-2.0
"""Checkpoints: everything that the rest of a run depends on, in one safetensors file.

A file appears whole or not at all, carries a digest of its content and is never executed: tensors
are stored as safetensors, all else as JSON in its header.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from logging import WARNING
from pathlib import Path
from types import FrameType
from typing import Any

from flwr.common.logger import log
from safetensors import safe_open
from torch import Tensor

from fedfusion_flwr.config import RunConfig
from fedfusion_flwr.errors import FedFusionError
from fedfusion_flwr.federation.round import RoundReport
from fedfusion_flwr.federation.strategy import FederatedStrategy
from fedfusion_flwr.tracking.artifacts import RunDirectory, state_digest
from fedfusion_flwr.tracking.snapshot import Tree, capture, rebuild

KEPT = 2
"""How many checkpoints are kept: if the last is damaged, there is one before it."""
FORMAT = "fedfusion-checkpoint-2"
_NAME = re.compile(r"checkpoint-(\d{6})\.safetensors")

MAY_DIFFER = {
    "num-server-rounds",
    "output-dir",
    "resume-from",
    "checkpoint-every",
    "patience",
    "node-timeout",
    "round-timeout",
    "tensorboard",
}
"""Keys that a resumed run may change: none of them affects the result of a round."""


class CheckpointError(FedFusionError, RuntimeError):
    """There is no usable checkpoint, or it belongs to another run."""


class RunInterrupted(FedFusionError, RuntimeError):
    """The run was asked to end and has done so, after a checkpoint."""


@dataclass(frozen=True)
class Checkpoint:
    """The states after ``server_round`` finished rounds of the run with this config.

    ``states`` and ``tensors`` are what `capture` makes of them.
    """

    server_round: int
    config: dict[str, Any]
    states: dict[str, Tree]
    tensors: dict[str, Tensor]

    def restored(self, name: str, present: object) -> Any:
        """The state of that name, of the type of the present one."""
        return rebuild(self.states[name], self.tensors, present)


class Checkpointer:
    """Writes a checkpoint periodically, after the last round, and when the run is asked to end.

    Parameters
    ----------
    directory : RunDirectory
        Where checkpoints go.
    config : RunConfig
        Stored with the state.
    strategy : FederatedStrategy
        Its progress and state are written.
    parts : Mapping[str, object]
        Other objects to restore, by name; the ``state`` of each is a dataclass.
    before : callable
        Called before each checkpoint, to write the other files that a resumed run reads.
    """

    def __init__(
        self,
        directory: RunDirectory,
        config: RunConfig,
        strategy: FederatedStrategy,
        parts: Mapping[str, object],
        before: Callable[[], None],
    ) -> None:
        self.directory = directory
        self.config = config
        self.strategy = strategy
        self.states: dict[str, tuple[object, str]] = {
            "progress": (strategy, "progress"),
            "strategy": (strategy, "state"),
            **{name: (part, "state") for name, part in parts.items()},
        }
        self.before = before
        self.asked_by: str | None = None

    def on_round_end(self, report: RoundReport) -> None:
        """Write the round's checkpoint, if it is due; raise `RunInterrupted` if asked to end."""
        every, last = self.config.checkpoint_every, self.config.num_server_rounds
        done = report.server_round
        # A round that ends the run by failing is not done: the strategy is between two states.
        if done == 0 or self.strategy.progress.rounds_done != done:
            return
        if self.asked_by or (every and (done % every == 0 or done == last)):
            self._write(done)
        if self.asked_by:
            raise RunInterrupted(
                f"ended by {self.asked_by} after round {done}; go on with "
                f"resume-from = '{self.directory.path}'"
            )

    def restore(self, checkpoint: Checkpoint) -> None:
        """Restore all parts from a checkpoint."""
        for name, (owner, attribute) in self.states.items():
            setattr(owner, attribute, checkpoint.restored(name, getattr(owner, attribute)))

    def _write(self, server_round: int) -> None:
        self.before()
        states = {name: getattr(*place) for name, place in self.states.items()}
        checkpoint = Checkpoint(server_round, self.config.to_run_config(), *capture(states))
        try:
            write_checkpoint(self.directory, checkpoint)
        except OSError as problem:
            # The previous checkpoint is still whole; a full disk need not end the run.
            log(WARNING, "round %d: no checkpoint could be written: %s", server_round, problem)


@contextlib.contextmanager
def ended_by_signals(checkpointer: Checkpointer) -> Iterator[None]:
    """While open, SIGTERM or SIGINT ends the run cleanly after its round; a second one at once.

    Works only in a process's main thread, where a deployment runs its ServerApp. A simulation runs
    it in another thread and has to rely on the last periodic checkpoint.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def ask(number: int, frame: FrameType | None) -> None:
        if checkpointer.asked_by:
            raise KeyboardInterrupt
        checkpointer.asked_by = signal.Signals(number).name
        log(WARNING, "%s: the run ends after this round", checkpointer.asked_by)

    before = {number: signal.signal(number, ask) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def write_checkpoint(directory: RunDirectory, checkpoint: Checkpoint) -> None:
    """Write ``checkpoint-<round>.safetensors`` and remove all but the newest `KEPT`."""
    server_round, tensors = checkpoint.server_round, checkpoint.tensors
    content = json.dumps(
        {"round": server_round, "config": checkpoint.config, "state": checkpoint.states}
    )
    metadata = {"format": FORMAT, "content": content, "digest": _digest(content, tensors)}
    directory.write_state(f"checkpoint-{server_round:06d}.safetensors", tensors, **metadata)
    for path in _files(directory.path)[KEPT:]:
        with contextlib.suppress(OSError):
            path.unlink()


def read_checkpoint(path: Path) -> Checkpoint:
    """Read one file and verify its digest.

    Raises
    ------
    CheckpointError
        If it is not a complete, undamaged checkpoint.
    """
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except Exception as problem:
        raise CheckpointError(f"checkpoint '{path}' is damaged ({problem})") from problem
    if metadata.get("format") != FORMAT:
        raise CheckpointError(f"'{path}' is not a checkpoint of format {FORMAT}")
    if metadata.get("digest") != _digest(metadata["content"], tensors):
        raise CheckpointError(f"checkpoint '{path}' is damaged: its digest does not match")
    content = json.loads(metadata["content"])
    return Checkpoint(content["round"], content["config"], content["state"], tensors)


def newest_checkpoint(directory: Path, config: RunConfig) -> Checkpoint:
    """The newest undamaged checkpoint in a run directory; damaged ones are logged and skipped.

    Raises
    ------
    CheckpointError
        If none is left, or it was made with another config.
    """
    if not directory.is_dir():
        raise CheckpointError(f"resume-from '{directory}' is not a run directory")
    for path in _files(directory):
        try:
            checkpoint = read_checkpoint(path)
        except CheckpointError as problem:
            log(WARNING, "%s; trying the previous one", problem)
            continue
        _check_config(checkpoint, config, directory)
        return checkpoint
    raise CheckpointError(
        f"resume-from '{directory}' holds no usable checkpoint; start the run again (and set "
        "checkpoint-every to get some)"
    )


def _check_config(checkpoint: Checkpoint, config: RunConfig, directory: Path) -> None:
    wanted = config.to_run_config()
    for key in sorted((wanted.keys() | checkpoint.config.keys()) - MAY_DIFFER):
        before, now = checkpoint.config.get(key), wanted.get(key)
        if before != now:
            raise CheckpointError(
                f"{key} = {now!r}, but the run in '{directory}' has {before!r}: resume it with the "
                "same value, or start another run"
            )
    if config.num_server_rounds < checkpoint.server_round:
        raise CheckpointError(
            f"num-server-rounds = {config.num_server_rounds}, but the run in '{directory}' has "
            f"finished {checkpoint.server_round} rounds already"
        )


def _files(directory: Path) -> list[Path]:
    """The checkpoints of a run, newest first."""
    return sorted((p for p in directory.iterdir() if _NAME.fullmatch(p.name)), reverse=True)


def _digest(content: str, tensors: Mapping[str, Tensor]) -> str:
    return hashlib.sha256(f"{content}{state_digest(tensors)}".encode()).hexdigest()
