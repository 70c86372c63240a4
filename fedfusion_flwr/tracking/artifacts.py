# SPDX-License-Identifier: Apache-2.0
"""The run directory, written as the run goes on: an interruption loses one round at most.

Only ``fusion.npz`` may lag behind a little; see `FusionArchive`.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors.torch import save
from torch import Tensor

from fedfusion_flwr import atomic
from fedfusion_flwr.config import RunConfig
from fedfusion_flwr.errors import FedFusionError

RUNS_FOLDER = "fedfusion-runs"


class OutputError(FedFusionError, OSError):
    """The run directory cannot be used."""


def run_path(name: str) -> Path:
    """The path of ``output-dir`` or ``resume-from``; relative ones are in ``~/fedfusion-runs``."""
    return Path.home() / RUNS_FOLDER / Path(name).expanduser()


class RunDirectory:
    """One run's files.

    Parameters
    ----------
    path : Path
        Created if absent.

    Raises
    ------
    OutputError
        If it already holds a run, or cannot be written.
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
        return cls(run_path(name))

    @classmethod
    def to_go_on_with(cls, path: Path) -> RunDirectory:
        """The directory of an earlier run, cleared of files that were left half-written."""
        directory = cls.__new__(cls)
        directory.path = path
        for torn in path.glob(f".*{atomic.PART}"):
            torn.unlink(missing_ok=True)
        return directory

    def writing(self, name: str) -> AbstractContextManager[BinaryIO]:
        """A file that appears whole or not at all."""
        return atomic.writing(self.path / name)

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
        tensors = {key: value.detach().cpu().contiguous().clone() for key, value in state.items()}
        with self.writing(name) as file:
            file.write(save(tensors, {k.replace("_", "-"): str(v) for k, v in metadata.items()}))

    def append_json(self, name: str, *rows: Mapping[str, Any]) -> None:
        """Append rows to a JSON-lines file; numbers that are not finite become null."""
        text = "".join(json.dumps(_finite(row), allow_nan=False) + "\n" for row in rows)
        with (self.path / name).open("a", encoding="utf-8") as file:
            file.write(text)


def state_digest(state: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, types, shapes and bytes of a state dict: equal models, equal digests."""
    digest = hashlib.sha256()
    for key in sorted(state):
        value = state[key].detach().cpu().contiguous()
        digest.update(f"{key}|{value.dtype}|{tuple(value.shape)}|".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return value
