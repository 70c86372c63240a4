# SPDX-License-Identifier: Apache-2.0
"""What a run inferred of its clients: read from its ``fusion.npz``, and kept beside its row.

``inferred/<cell>.npz`` in a suite's folder holds what `Inferred.drawn` leaves of it, with the
digest of the run. Its job writes it, so that nobody needs the run directory to draw it.
"""

from __future__ import annotations

import dataclasses
import io
import zipfile
import zlib
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from pandas import DataFrame
from scipy.optimize import linear_sum_assignment

from fedfusion_flwr.experiments.results import Results, first_of
from fedfusion_flwr.experiments.rows import ResultsError, write_bytes
from fedfusion_flwr.fusion.standardizer import Standardizer

FOLDER = "inferred"
ARCHIVE = "fusion.npz"
_MAP = "map-"

OCCUPIED = 0.01
"""A component with less than this share of the clients in every round is not drawn."""
LEAST_CLIENTS = 4
"""Fewer points make no map."""
KINDS = ("mean", "log deviation", "shift", "scale")
"""Of normalization parameters, in the order in which they lie in ``statistics``."""
MOST_CHANNELS = 100
"""Most channels drawn of one component and kind."""
MOST_SHARES = 20_000
"""Of more assignments than these, four digits are kept."""
_MAX_PERPLEXITY = 30.0


@dataclass(frozen=True)
class Inferred:
    """The inference of a run; see `FusionArchive` for the shapes.

    ``statistics`` is None in runs that did not record it; ``planted`` holds -1 where the true
    component is not known, and ``planted_mixtures`` (K, M of the partition) NaN; it is None where
    nothing is planted or the run did not record it. What `drawn` gives has ``maps``, client
    positions (K, 2) by method, and of ``components`` and ``statistics`` only what the pictures
    show: the last round, and ``channels``, numbers (S,) of the channels that are left; None stands
    for all. ``digest`` is the run's, where it was kept.
    """

    rounds: np.ndarray
    clients: np.ndarray
    assignments: np.ndarray
    mixture: np.ndarray
    inferred_mixture: np.ndarray
    components: np.ndarray
    planted: np.ndarray
    statistics: np.ndarray | None = None
    planted_mixtures: np.ndarray | None = None
    channels: np.ndarray | None = None
    digest: np.ndarray | None = None
    maps: dict[str, np.ndarray] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> Inferred:
        """Read one ``fusion.npz``, also of versions that recorded less, or what was kept of it."""
        with np.load(path, allow_pickle=False) as stored:
            arrays = {name: stored[name] for name in stored.files}
        arrays.setdefault("planted", np.full(len(arrays["clients"]), -1))
        maps = {n.removeprefix(_MAP): a for n, a in arrays.items() if n.startswith(_MAP)}
        known = {f.name for f in dataclasses.fields(cls)}
        return cls(**{name: a for name, a in arrays.items() if name in known}, maps=maps)

    def write(self, path: Path) -> None:
        """Write it as a file that `read` reads; the same arrays make the same bytes."""
        arrays = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        arrays |= {_MAP + method: points for method, points in arrays.pop("maps").items()}
        buffer = io.BytesIO()
        # numpy gives the members no time.
        np.savez_compressed(buffer, **{n: a for n, a in arrays.items() if a is not None})
        write_bytes(path, buffer.getvalue())

    @property
    def is_planted(self) -> bool:
        """Whether the true components of all clients are known."""
        return bool((self.planted >= 0).all())

    @property
    def main_components(self) -> np.ndarray:
        """The inferred component that counts most for each client in the last round, (K,)."""
        return np.asarray(self.assignments[-1].argmax(1))

    @property
    def occupied(self) -> list[int]:
        """The components that hold some share of the clients in some round."""
        shares = np.nanmean(self.assignments, axis=1)
        return [int(m) for m in np.flatnonzero((shares >= OCCUPIED).any(0))]

    @property
    def order(self) -> np.ndarray:
        """Clients by planted component where known, then by inferred one, (K,)."""
        return np.lexsort((self.clients, self.main_components, self.planted))

    def drawn(self) -> Inferred:
        """What the pictures show of a whole inference, and no more."""
        maps, statistics, channels, columns = {}, self.statistics, np.arange(0), np.arange(0)
        if statistics is not None:
            if len(self.clients) >= LEAST_CLIENTS:
                maps = positions(statistics)
            if self.is_planted:
                width = statistics.shape[1] // len(KINDS)
                count = min(width, MOST_CHANNELS)
                channels = np.unique(np.linspace(0, width - 1, count).round().astype(int))
                columns = np.concatenate([i * width + channels for i in range(len(KINDS))])
            statistics = np.ascontiguousarray(statistics[:, columns])
        many = self.assignments.size > MOST_SHARES
        return dataclasses.replace(
            self,
            assignments=self.assignments.round(4) if many else self.assignments,
            components=np.ascontiguousarray(self.components[-1:, :, columns]),
            statistics=statistics,
            channels=channels,
            maps=maps,
        )


def positions(statistics: np.ndarray) -> dict[str, np.ndarray]:
    """Clients in the plane, (K, 2) each, by principal components and by t-SNE.

    Statistics (K, D) are standardized over the clients just as the inference does. t-SNE starts
    from the principal components and draws nothing, so equal input gives an equal map; its
    perplexity is a third of the clients, 30 at most. Distances between far groups mean nothing in
    it.
    """
    # Here, not above: they take seconds to import, and only runs that are drawn need them.
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    x = torch.from_numpy(statistics).double()
    z = Standardizer.of(x).standardize(x).numpy()
    if not z.any():
        return {"PCA": np.zeros((len(z), 2))}
    width = min(2, *z.shape)
    flat = PCA(width, svd_solver="full").fit_transform(z)
    flat = np.pad(flat, ((0, 0), (0, 2 - width)))
    perplexity = min(_MAX_PERPLEXITY, (len(z) - 1) / 3)
    scale = flat / flat[:, 0].std() * 1e-4
    tsne = TSNE(2, perplexity=perplexity, init=scale, random_state=0, method="exact")
    return {"PCA": flat, "t-SNE": tsne.fit_transform(z)}


def matched(planted: np.ndarray, assignments: np.ndarray) -> dict[int, int]:
    """Which component stands for each planted one: the pairing with the most client mass.

    Parameters
    ----------
    planted : np.ndarray
        True component of each client, (K,), from 0.
    assignments : np.ndarray
        b, (K, M).

    Returns
    -------
    dict[int, int]
        Component by planted component; planted components beyond M are left out.
    """
    overlap = np.zeros((int(planted.max()) + 1, assignments.shape[1]))
    np.add.at(overlap, planted, assignments)
    rows, columns = linear_sum_assignment(overlap, maximize=True)
    pairs = zip(rows.tolist(), columns.tolist(), strict=True)
    return {row: column for row, column in pairs if overlap[row, column] > 0}


def true_components(statistics: np.ndarray, planted: np.ndarray) -> dict[int, np.ndarray]:
    """Mean statistics (D,) of the clients of each planted component."""
    return {int(m): statistics[planted == m].mean(0) for m in np.unique(planted)}


def keep_inferred(run_directory: Path, file: Path, digest: str) -> None:
    """Write what is drawn of a run's inference, if there was one."""
    archive = run_directory / ARCHIVE
    if archive.exists():
        run = Inferred.read(archive).drawn()
        dataclasses.replace(run, digest=np.array(digest)).write(file)


def first_inference(
    results: Results, runs: DataFrame, missing: list[str]
) -> tuple[int, Inferred] | None:
    """The seed and what is drawn of the inference of the least seed whose inference was kept.

    ``missing`` gets a sentence on each file that cannot be read.
    """
    for run in runs.sort_values("seed", kind="stable").to_dict("records"):
        if results.is_run:
            archive = results.path / ARCHIVE
            return (run["seed"], Inferred.read(archive).drawn()) if archive.exists() else None
        path = results.path / FOLDER / f"{run['cell']}.npz"
        if path.exists():
            try:
                return run["seed"], _read_kept(path, str(run.get("digest") or ""))
            except ResultsError as problem:
                missing.append(f"{problem}; it is ignored.")
    return None


def strangers(results: Results) -> list[str]:
    """A sentence about the files in ``inferred/`` that are of no run of the suite, if any."""
    found = sorted(path.stem for path in results.path.glob(f"{FOLDER}/*.npz"))
    found = [name for name in found if name not in set(results.runs["cell"])]
    if results.is_run or not found:
        return []
    return [f"'{FOLDER}' has files of no run that is here ({first_of(found)}); they are ignored."]


def _read_kept(path: Path, digest: str) -> Inferred:
    name = f"{FOLDER}/{path.name}"
    try:
        run = Inferred.read(path)
    except (OSError, EOFError, KeyError, TypeError, ValueError, zipfile.BadZipFile,
            zlib.error) as problem:  # fmt: skip
        raise ResultsError(f"'{name}' is damaged ({problem})") from problem
    if str(run.digest) != digest:
        raise ResultsError(f"'{name}' is of another run than the one in cells.jsonl")
    return run
