# SPDX-License-Identifier: Apache-2.0
"""What a run inferred of its clients, read back from ``fusion.npz``."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE

from fedfusion_flwr.fusion.standardizer import Standardizer

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
    component is not known. What `drawn` gives has ``maps``, client positions (K, 2) by method, and
    of ``components`` and ``statistics`` only what the pictures show: the last round, and
    ``channels``, numbers (S,) of the channels that are left; None stands for all.
    """

    rounds: np.ndarray
    clients: np.ndarray
    assignments: np.ndarray
    mixture: np.ndarray
    inferred_mixture: np.ndarray
    components: np.ndarray
    planted: np.ndarray
    statistics: np.ndarray | None
    channels: np.ndarray | None = None
    maps: dict[str, np.ndarray] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> Inferred:
        """Read one ``fusion.npz``, also of versions that recorded less."""
        with np.load(path, allow_pickle=False) as stored:
            arrays = {name: stored[name] for name in stored.files}
        return cls(
            arrays["rounds"],
            arrays["clients"],
            arrays["assignments"],
            arrays["mixture"],
            arrays["inferred_mixture"],
            arrays["components"],
            arrays.get("planted", np.full(len(arrays["clients"]), -1)),
            arrays.get("statistics"),
        )

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

    def drawn(self) -> Inferred:
        """What the pictures show of a whole inference, and no more."""
        maps, channels, columns = {}, np.arange(0), np.arange(0)
        if self.statistics is not None:
            if len(self.clients) >= LEAST_CLIENTS:
                maps = positions(self.statistics)
            if self.is_planted:
                width = self.statistics.shape[1] // len(KINDS)
                count = min(width, MOST_CHANNELS)
                channels = np.unique(np.linspace(0, width - 1, count).round().astype(int))
                columns = np.concatenate([i * width + channels for i in range(len(KINDS))])
        many = self.assignments.size > MOST_SHARES
        return replace(
            self,
            assignments=self.assignments.round(4) if many else self.assignments,
            components=np.ascontiguousarray(self.components[-1:, :, columns]),
            statistics=None
            if self.statistics is None
            else np.ascontiguousarray(self.statistics[:, columns]),
            channels=channels,
            maps=maps,
        )

    def order(self) -> np.ndarray:
        """Clients by planted component where known, then by inferred one, (K,)."""
        return np.lexsort((self.clients, self.main_components, self.planted))


def positions(statistics: np.ndarray) -> dict[str, np.ndarray]:
    """Clients in the plane, (K, 2) each, by principal components and by t-SNE.

    Statistics (K, D) are standardized over the clients just as the inference does. t-SNE starts
    from the principal components and draws nothing, so equal input gives an equal map; its
    perplexity is a third of the clients, 30 at most. Distances between far groups mean nothing in
    it.
    """
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
