# SPDX-License-Identifier: Apache-2.0
"""How well inferred components or clusters match planted ones; for the `components` partition."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from fedfusion_flwr.federation.round import RoundReport


@dataclass
class Partitions:
    """The partition of every client that named one."""

    partition_of: dict[int, int] = field(default_factory=dict)


class ComponentRecovery:
    """Scores found against planted components; must come before the callbacks that write.

    Adds ``planted`` to the round's report, and to its metrics ``adjusted-rand-index`` (Hubert &
    Arabie 1985; 1 for the same division, 0 for a random one, negative if worse) and
    ``normalized-mutual-information`` (over the mean of the two entropies; 1 for the same division,
    0 for independent ones; random divisions score above 0).

    Parameters
    ----------
    main_components : numpy.ndarray
        The planted main component of every partition, shape (K,).
    """

    def __init__(self, main_components: np.ndarray) -> None:
        self.main_components = main_components
        self.state = Partitions()

    def on_round_end(self, report: RoundReport) -> None:
        """Score the clients whose partition is known."""
        for row in report.clients:
            if row.client is None or row.partition is None:
                continue
            # The client reports it, so it is checked.
            if row.partition in range(len(self.main_components)):
                self.state.partition_of[row.client] = row.partition
        report.planted = {
            client: int(self.main_components[partition])
            for client, partition in self.state.partition_of.items()
        }
        pairs = [
            (report.planted[client], cluster)
            for client, cluster in report.clusters.items()
            if client in report.planted
        ]
        if len(pairs) > 1:
            # Imported here: sklearn is slow to import, and the first clients can train meanwhile.
            from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score

            planted, found = zip(*pairs, strict=True)
            report.metrics["adjusted-rand-index"] = float(adjusted_rand_score(planted, found))
            report.metrics["normalized-mutual-information"] = float(
                normalized_mutual_info_score(planted, found)
            )
