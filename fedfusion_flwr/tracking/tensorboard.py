# SPDX-License-Identifier: Apache-2.0
"""The numbers of every round as a TensorBoard log."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from fedfusion_flwr.config import ConfigError
from fedfusion_flwr.federation.round import RoundReport


class TensorBoardLog:
    """Writes every metric, the seconds of every phase and the mixture; ``round`` is the step.

    Parameters
    ----------
    folder : Path
        Where the event files go.

    Raises
    ------
    ConfigError
        If TensorBoard is not installed.
    """

    def __init__(self, folder: Path) -> None:
        try:
            # Imported here: it is an optional extra, and takes a second to import.
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as problem:
            raise ConfigError(
                "tensorboard = True, but TensorBoard is not installed: "
                "pip install 'fedfusion-flwr[tensorboard]', or set tensorboard = False"
            ) from problem
        self._open: Any = SummaryWriter
        self.folder = folder
        self.first_round = 0
        self._writer: Any = None

    def on_round_end(self, report: RoundReport) -> None:
        """Write the round and flush it to disk."""
        if self._writer is None:
            # Readers of the log then ignore what an earlier file holds for these rounds.
            purge = self.first_round or None
            self._writer = self._open(str(self.folder), purge_step=purge)
        scalars = dict(report.metrics)
        scalars |= {f"seconds/{name}": value for name, value in report.seconds.items()}
        if report.fusion is not None:
            mixture = enumerate(report.fusion.mixture.tolist())
            scalars |= {f"mixture/{number}": share for number, share in mixture}
        for name, value in scalars.items():
            if math.isfinite(value):
                self._writer.add_scalar(name, value, report.server_round)
        self._writer.flush()

    def rewind(self, server_round: int) -> None:
        """Forget the rounds after this one."""
        self.first_round = server_round + 1
