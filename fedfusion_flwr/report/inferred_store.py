# SPDX-License-Identifier: Apache-2.0
"""``inferred/`` in a suite's folder: what is drawn of inferences, which outlives run directories.

``inferred/<cell>/drawn.npz`` holds what `Inferred.drawn` leaves of a run's ``fusion.npz``, with the
digest of the run.
"""

from __future__ import annotations

import io
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fedfusion_flwr.experiments.rows import write_bytes
from fedfusion_flwr.report.evidence import Cell, Evidence, ReportError, first_of
from fedfusion_flwr.report.inferred import Inferred

FOLDER = "inferred"
_FILE = "drawn.npz"
_ARRAYS = (
    "rounds",
    "clients",
    "assignments",
    "mixture",
    "inferred_mixture",
    "components",
    "planted",
    "channels",
)
_MAP = "map-"


def first_inference(
    evidence: Evidence, cells: Sequence[Cell], missing: list[str]
) -> tuple[Cell, Inferred] | None:
    """The run of the least seed whose inference was kept, and what is drawn of it.

    Where a suite's run directory is there, what is drawn is also written to the suite's folder;
    where it is not, it is read from there.

    Parameters
    ----------
    evidence : Evidence
        The run or suite.
    cells : Sequence[Cell]
        Of one setting.
    missing : list of str
        Gets a sentence about what could not be read or written.
    """
    for cell in sorted(cells, key=lambda cell: cell.seed):
        stored = evidence.path / FOLDER / cell.name / _FILE
        archive = None if cell.directory is None else cell.directory / "fusion.npz"
        if archive is not None and archive.exists():
            run = Inferred.read(archive).drawn()
            if cell.digest and not evidence.is_run:
                try:
                    write_bytes(stored, _packed(run, cell.digest))
                except OSError as problem:
                    # It can be drawn all the same.
                    missing.append(f"'{_name(cell)}' cannot be written ({problem.strerror}).")
            return cell, run
        if not evidence.is_run and stored.exists():
            try:
                return cell, _read(stored, cell)
            except ReportError as problem:
                missing.append(f"{problem}; it is ignored.")
    return None


def strangers(evidence: Evidence) -> list[str]:
    """A sentence about the folders in ``inferred/`` that are of no run of the suite, if any."""
    known = {cell.name for cells in evidence.compared.values() for cell in cells}
    found = sorted(
        path.parent.name
        for path in evidence.path.glob(f"{FOLDER}/*/{_FILE}")
        if path.parent.name not in known
    )
    if evidence.is_run or not found:
        return []
    return [f"'{FOLDER}' has folders of no run that is here ({first_of(found)}); they are ignored."]


def _packed(run: Inferred, digest: str) -> bytes:
    arrays = {name: getattr(run, name) for name in _ARRAYS}
    arrays |= {_MAP + method: points for method, points in run.maps.items()}
    if run.statistics is not None:
        arrays["statistics"] = run.statistics
    buffer = io.BytesIO()
    # The same arrays make the same bytes: numpy gives the members no time.
    np.savez_compressed(buffer, digest=np.array(digest), **arrays)
    return buffer.getvalue()


def _read(path: Path, cell: Cell) -> Inferred:
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        digest = str(arrays["digest"])
        run = Inferred(
            **{name: arrays[name] for name in _ARRAYS},
            statistics=arrays.get("statistics"),
            maps={
                name.removeprefix(_MAP): points
                for name, points in arrays.items()
                if name.startswith(_MAP)
            },
        )
    except (OSError, EOFError, KeyError, ValueError, zipfile.BadZipFile, zlib.error) as problem:
        raise ReportError(f"'{_name(cell)}' is damaged ({problem})") from problem
    if digest != cell.digest:
        raise ReportError(f"'{_name(cell)}' is of another run than the one in cells.jsonl")
    return run


def _name(cell: Cell) -> str:
    return f"{FOLDER}/{cell.name}/{_FILE}"
