# SPDX-License-Identifier: Apache-2.0
"""Rows of results: one JSON object a line, each with what identifies the run behind it."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import subprocess
import tempfile
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from fedfusion_flwr.errors import FedFusionError

Row = dict[str, Any]


class ResultsError(FedFusionError, ValueError):
    """A folder that holds no results, or records that cannot be read."""


def read_rows(path: Path) -> list[Row]:
    """The rows of a file; none where it does not exist.

    A last line that was cut off, or is just being written, is no row.

    Raises
    ------
    ResultsError
        If any other line is not a JSON object; the sentence names file and line.
    """
    if not path.exists():
        return []
    # Bytes that are not text spoil their own line only.
    *lines, _ = path.read_text(encoding="utf-8", errors="replace").split("\n")
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            problem = None if isinstance(row, dict) else "is not a JSON object"
        except json.JSONDecodeError as error:
            problem = f"is not JSON ({error.msg})"
        if problem is None:
            rows.append(row)
        elif number < len(lines):
            raise ResultsError(f"'{path}', line {number}, {problem}")
    return rows


def read_all(folder: Path, kind: str) -> list[Row]:
    """The rows of a kind, of all its files."""
    return [row for path in files_of(folder, kind) for row in read_rows(path)]


def files_of(folder: Path, kind: str) -> list[Path]:
    """The files with rows of a kind: ``<kind>.jsonl`` first, then ``<kind>-*.jsonl`` by name."""
    return [folder / f"{kind}.jsonl", *sorted(folder.glob(f"{kind}-*.jsonl"))]


def append_row(path: Path, row: Row) -> None:
    """Add a row to a file; after this it is on disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(_line(row))
        file.flush()
        os.fsync(file.fileno())


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    """Replace a file by these rows, all at once."""
    write_text(path, "".join(map(_line, rows)))


def put_row(path: Path, row: Row, *keys: str) -> None:
    """Add a row to a file, in the place of those that have the same values of these keys."""
    others = [other for other in read_rows(path) if any(other.get(k) != row.get(k) for k in keys)]
    write_rows(path, [*others, row])


def write_text(path: Path, text: str) -> None:
    """Replace a file, all at once."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, content: bytes) -> None:
    """Replace a file, all at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


def identity() -> Row:
    """Versions, commit and machine; ask before the run, while nobody has changed a file."""
    import torch

    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "flwr": version("flwr"),
        "commit": _commit(),
        "machine": f"{os.cpu_count()} cores, {platform.machine()} with {instructions()}{gpu}",
    }


def instructions() -> str:
    """What of a processor decides how torch rounds, e.g. ``AVX512 and AMX``."""
    import torch

    vectors = torch.backends.cpu.get_cpu_capability()
    amx = vectors == "AVX512" and torch.cpu._is_amx_tile_supported()
    return f"{vectors} and AMX" if amx else vectors


def _commit() -> str:
    """The commit of this package's clone, marked if files were changed; or its version."""
    folder = Path(__file__).parents[2]
    if (folder / ".git").exists():
        command = ["git", "describe", "--always", "--dirty", "--exclude", "*"]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        if done.stdout.strip():
            return done.stdout.strip()
    return f"version {version('fedfusion-flwr')}"


def _line(row: Row) -> str:
    return json.dumps(row, separators=(",", ":")) + "\n"
