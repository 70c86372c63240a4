# SPDX-License-Identifier: Apache-2.0
"""The run directory: written as the run goes on; an interruption loses one round at most."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import hashlib
import io
import json
import math
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor

from fedfusion_flwr.config import RunConfig
from fedfusion_flwr.errors import FedFusionError
from fedfusion_flwr.rounds import FusionSnapshot, RoundReport

RUNS_FOLDER = "fedfusion-runs"
GLOBAL_ACCURACY = "global-accuracy"


class OutputError(FedFusionError, OSError):
    """The run directory cannot be used."""


class RunDirectory:
    """One run's files.

    Parameters
    ----------
    path : Path
        Created if absent.

    Raises
    ------
    OutputError
        If another run's metrics lie there already, or it cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if (path / "metrics.jsonl").exists():
            raise OutputError(
                f"output-dir '{path}' already holds a run; choose another or remove it"
            )
        try:
            path.mkdir(parents=True, exist_ok=True)
            with self.writing("config.json"):
                pass
        except OSError as problem:
            raise OutputError(
                f"output-dir '{path}' cannot be written ({problem.strerror}); choose another"
            ) from problem

    @classmethod
    def for_config(cls, config: RunConfig) -> RunDirectory:
        """The directory that ``output-dir`` names; by default a new one under the user's home.

        Relative paths are taken under ``~/fedfusion-runs``: the app runs from Flower's own folder,
        so the user's working directory is not known here.
        """
        name = config.output_dir
        if not name:
            now = datetime.datetime.now().strftime("%Y%m%d-%H%M%S-%f")
            name = f"{now}-{config.strategy}-{config.dataset.replace(':', '-')}"
        return cls(Path.home() / RUNS_FOLDER / Path(name).expanduser())

    @contextlib.contextmanager
    def writing(self, name: str) -> Iterator[BinaryIO]:
        """A file that appears whole or not at all: written aside, synced, renamed."""
        handle, temporary = tempfile.mkstemp(dir=self.path, prefix=f".{name}.")
        try:
            with os.fdopen(handle, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.chmod(temporary, 0o666 & ~_umask())
            os.replace(temporary, self.path / name)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary)
            raise

    def write_json(self, name: str, value: Any) -> None:
        """Write a JSON file, keys in the order given."""
        with self.writing(name) as file:
            file.write((json.dumps(value, indent=2) + "\n").encode())

    def write_lines(self, name: str, lines: Iterable[str]) -> None:
        """Write a text file, one string a line, UTF-8."""
        with self.writing(name) as file:
            file.write("".join(f"{line}\n" for line in lines).encode())

    def write_state(self, name: str, state: Mapping[str, Tensor], **metadata: object) -> None:
        """Write a state dict as safetensors; metadata values become strings."""
        tensors = {key: value.contiguous().clone() for key, value in state.items()}
        with self.writing(name) as file:
            file.write(save(tensors, {k.replace("_", "-"): str(v) for k, v in metadata.items()}))

    def append_json(self, name: str, *rows: Mapping[str, Any]) -> None:
        """Append rows to a JSON-lines file; numbers that are not finite become null."""
        text = "".join(json.dumps(_finite(row), allow_nan=False) + "\n" for row in rows)
        with (self.path / name).open("a", encoding="utf-8") as file:
            file.write(text)


class RunLog:
    """``metrics.jsonl``, one row a round, and ``clients.jsonl``, one row a client and round."""

    def __init__(self, directory: RunDirectory) -> None:
        self.directory = directory

    def on_round_end(self, report: RoundReport) -> None:
        """Append the round's rows."""
        row: dict[str, Any] = {"round": report.server_round}
        row |= {key: value for key, value in report.metrics.items() if key not in row}
        row["clients-sampled"] = report.num_sampled
        if report.fusion is not None:
            row["mixture"] = report.fusion.mixture.tolist()
        row["seconds"] = report.seconds
        self.directory.append_json("metrics.jsonl", row)
        self.directory.append_json(
            "clients.jsonl",
            *(
                _client_row(report.server_round, dataclasses.asdict(client))
                for client in report.clients
            ),
        )


class FusionArchive:
    """``fusion.npz``: the inference of every round, padded with NaN where a client was unknown yet.

    ``rounds`` (R,), ``clients`` (K,), ``assignments`` (R, K, M), ``mixture`` (R, M) as used,
    ``inferred_mixture`` (R, M), ``weights`` (R, K), ``components`` (R, M, D).
    """

    def __init__(self, directory: RunDirectory) -> None:
        self.directory = directory
        self.rounds: list[int] = []
        self.snapshots: list[FusionSnapshot] = []

    def on_round_end(self, report: RoundReport) -> None:
        """Add the round and rewrite the file, if there was an inference."""
        if report.fusion is None:
            return
        self.rounds.append(report.server_round)
        self.snapshots.append(report.fusion)
        clients = sorted({client for s in self.snapshots for client in s.clients})
        column = {client: i for i, client in enumerate(clients)}
        width = self.snapshots[0].mixture.numel()
        assignments = np.full((len(self.rounds), len(clients), width), np.nan)
        weights = np.full((len(self.rounds), len(clients)), np.nan)
        for r, snapshot in enumerate(self.snapshots):
            known = [column[client] for client in snapshot.clients]
            assignments[r, known] = snapshot.posterior.assignments.numpy()
            weights[r, known] = snapshot.weights.numpy()
        buffer = io.BytesIO()
        np.savez(
            buffer,
            rounds=np.array(self.rounds),
            clients=np.array(clients),
            assignments=assignments,
            weights=weights,
            mixture=np.stack([s.mixture.numpy() for s in self.snapshots]),
            inferred_mixture=np.stack([s.posterior.mixture.numpy() for s in self.snapshots]),
            components=np.stack(
                [s.posterior.components.numpy().astype(np.float32) for s in self.snapshots]
            ),
        )
        with self.directory.writing("fusion.npz") as file:
            file.write(buffer.getvalue())


class BestModel:
    """``best_model.safetensors``: the served model of the most accurate round."""

    def __init__(self, directory: RunDirectory) -> None:
        self.directory = directory
        self.accuracy = -math.inf
        self.server_round = 0

    def on_round_end(self, report: RoundReport) -> None:
        """Save the round's model if it is the best so far; the first of equals stays."""
        accuracy = report.metrics.get(GLOBAL_ACCURACY, -math.inf)
        if report.server_round > 0 and accuracy > self.accuracy:
            self.accuracy, self.server_round = accuracy, report.server_round
            self.directory.write_state(
                "best_model.safetensors",
                report.model,
                round=report.server_round,
                global_accuracy=accuracy,
            )


def state_digest(state: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, types, shapes and bytes of a state dict: equal models, equal digests."""
    digest = hashlib.sha256()
    for key in sorted(state):
        value = state[key].detach().cpu().contiguous()
        digest.update(f"{key}|{value.dtype}|{tuple(value.shape)}|".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _umask() -> int:
    """The process's file mask, which a temporary file ignores."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _client_row(server_round: int, row: dict[str, Any]) -> dict[str, Any]:
    metrics = row.pop("metrics")
    flat = {key.replace("_", "-"): value for key, value in row.items() if value is not None}
    flat = {"round": server_round, **flat}
    return flat | {key: value for key, value in metrics.items() if key not in flat}


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return value
