# SPDX-License-Identifier: Apache-2.0
"""How well inferred components or clusters match planted ones; for the `components` partition."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import numpy as np

from fedfusion_flwr.federation.round import RoundReport


@dataclass
class Partitions:
    """The partition of every client that named one."""

    partition_of: dict[int, int] = field(default_factory=dict)


class ComponentRecovery:
    """Scores found against planted components; must come before the callbacks that write.

    Adds ``planted`` and ``planted_mixtures`` to the round's report and, once two of the clients
    that were grouped are known, to its metrics:

    - ``adjusted-rand-index`` (Hubert & Arabie 1985; 1 for the same division, 0 for a random one,
      negative if worse);
    - ``normalized-mutual-information`` (over the mean of the two entropies; 1 for the same
      division, 0 for independent ones; random divisions score above 0);
    - ``occupied-groups``, how many planted groups make up more than half of some cluster;
    - ``assignment-error`` in rounds with an inference: see `assignment_error`.

    Parameters
    ----------
    mixtures : numpy.ndarray
        The planted mixture of every partition, shape (K, M), rows sum to 1. A client's group is
        the component with its largest share.
    """

    def __init__(self, mixtures: np.ndarray) -> None:
        self.mixtures = mixtures
        self.state = Partitions()

    def on_round_end(self, report: RoundReport) -> None:
        """Score the clients whose partition is known."""
        for row in report.clients:
            if row.client is None or row.partition is None:
                continue
            # The client reports it, so it is checked.
            if row.partition in range(len(self.mixtures)):
                self.state.partition_of[row.client] = row.partition
        report.planted_mixtures = {
            client: self.mixtures[partition]
            for client, partition in self.state.partition_of.items()
        }
        report.planted = {
            client: int(mixture.argmax()) for client, mixture in report.planted_mixtures.items()
        }
        _score_groups(report)
        _score_assignments(report)


def _score_groups(report: RoundReport) -> None:
    pairs = [
        (report.planted[client], cluster)
        for client, cluster in report.clusters.items()
        if client in report.planted
    ]
    if len(pairs) < 2:
        return
    # Imported here: sklearn is slow to import, and the first clients can train meanwhile.
    from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score

    planted, found = zip(*pairs, strict=True)
    report.metrics["adjusted-rand-index"] = float(adjusted_rand_score(planted, found))
    report.metrics["normalized-mutual-information"] = float(
        normalized_mutual_info_score(planted, found)
    )
    sizes = Counter(found)
    majorities = {group for (group, of), n in Counter(pairs).items() if 2 * n > sizes[of]}
    report.metrics["occupied-groups"] = float(len(majorities))


def _score_assignments(report: RoundReport) -> None:
    if report.fusion is None:
        return
    planted, clients = report.planted_mixtures, report.fusion.clients
    known = [row for row, client in enumerate(clients) if client in planted]
    if len(known) > 1:
        report.metrics["assignment-error"] = assignment_error(
            np.stack([planted[clients[row]] for row in known]),
            report.fusion.posterior.assignments.numpy()[known],
        )


def assignment_error(planted: np.ndarray, inferred: np.ndarray) -> float:
    """Mean total variation between mixtures after the best renumbering of the inferred components.

    Parameters
    ----------
    planted : numpy.ndarray
        Mixtures (K, M), rows sum to 1.
    inferred : numpy.ndarray
        Assignments b of the same clients, (K, N), rows sum to 1.

    Returns
    -------
    float
        In [0, 1]; 0 if they are equal.
    """
    planted, inferred, _ = renumbered(planted, inferred)
    return float(np.abs(planted - inferred).sum(1).mean() / 2)


def renumbered(
    planted: np.ndarray, inferred: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Both mixtures with max(M, N) columns, inferred ones in the order that fits planted ones best.

    The order has the least sum of absolute differences over the clients. Where one has fewer
    components than the other, columns of zeros stand for those that it lacks.

    Parameters
    ----------
    planted : numpy.ndarray
        Mixtures (K, M).
    inferred : numpy.ndarray
        Assignments b of the same clients, (K, N).

    Returns
    -------
    tuple of numpy.ndarray
        Planted and inferred mixtures, each (K, max(M, N)), and the order, (max(M, N),): the
        inferred component in each column, N or more for a column of zeros.
    """
    # Imported here for the same reason as sklearn.
    from scipy.optimize import linear_sum_assignment

    width = max(planted.shape[1], inferred.shape[1])
    planted, inferred = (
        np.pad(values, ((0, 0), (0, width - values.shape[1]))) for values in (planted, inferred)
    )
    differences = np.abs(planted[:, :, None] - inferred[:, None, :]).sum(0)
    _, order = linear_sum_assignment(differences)
    return planted, inferred[:, order], order
