# SPDX-License-Identifier: Apache-2.0
"""Callbacks that write the rows, inferences and best model of a run, or end it early."""

from __future__ import annotations

import dataclasses
import io
import json
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from fedfusion_flwr.federation.round import FusionSnapshot, RoundReport, StopRun
from fedfusion_flwr.fusion import FusionPosterior
from fedfusion_flwr.tracking.artifacts import RunDirectory


class RunLog:
    """``metrics.jsonl``, one row per round, and ``clients.jsonl``, one per client and round."""

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

    def rewind(self, server_round: int) -> None:
        """Forget the rounds after this one, and a truncated line."""
        for name in ("metrics.jsonl", "clients.jsonl"):
            path = self.directory.path / name
            lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
            kept = [line for line in lines if _round_of(line) <= server_round]
            with self.directory.writing(name) as file:
                file.write("".join(line + "\n" for line in kept).encode())


ARCHIVE_GROWTH = 1 / 16
"""``fusion.npz`` grows by this share before it is rewritten: rewriting it in every round would make
rounds slower as the run gets longer."""


class FusionArchive:
    """``fusion.npz``: the inference of every round, padded with NaN for clients not known yet.

    ``rounds`` (R,), ``clients`` (K,), ``assignments`` (R, K, M), ``mixture`` (R, M) as used,
    ``inferred_mixture`` (R, M), ``weights`` (R, K), ``components`` (R, M, D). Of the last round
    only: ``statistics`` (K, D), the inputs of the inference, in the units of ``components``; and
    ``planted`` (K,), the true main component, -1 if unknown.

    During a run the file may lack up to `ARCHIVE_GROWTH` of the rounds; `write` adds them.
    """

    def __init__(self, directory: RunDirectory) -> None:
        self.directory = directory
        self.rounds: list[int] = []
        self.snapshots: list[FusionSnapshot] = []
        self.planted: dict[int, int] = {}
        self._written = 0

    def on_round_end(self, report: RoundReport) -> None:
        """Add the round, if there was an inference; rewrite the file if it lacks enough rounds."""
        if report.fusion is None:
            return
        self.rounds.append(report.server_round)
        # Statistics may be wide: those of earlier rounds are dropped.
        self.snapshots[-1:] = [dataclasses.replace(s, statistics=None) for s in self.snapshots[-1:]]
        self.snapshots.append(report.fusion)
        self.planted = report.planted
        if len(self.rounds) - self._written > ARCHIVE_GROWTH * self._written:
            self.write()

    def write(self) -> None:
        """Rewrite the file if it lacks any round."""
        if self._written == len(self.rounds):
            return
        clients = sorted({client for s in self.snapshots for client in s.clients})
        column = {client: i for i, client in enumerate(clients)}
        width = self.snapshots[0].mixture.numel()
        assignments = np.full((len(self.rounds), len(clients), width), np.nan)
        weights = np.full((len(self.rounds), len(clients)), np.nan)
        for r, snapshot in enumerate(self.snapshots):
            known = [column[client] for client in snapshot.clients]
            assignments[r, known] = snapshot.posterior.assignments.numpy()
            weights[r, known] = snapshot.weights.numpy()
        latest: dict[str, Any] = {}
        newest = self.snapshots[-1]
        if newest.statistics is not None:
            wide = np.full((len(clients), newest.statistics.shape[1]), np.nan, np.float32)
            wide[[column[client] for client in newest.clients]] = newest.statistics
            latest["statistics"] = wide
        buffer = io.BytesIO()
        np.savez(
            buffer,
            **latest,
            planted=np.array([self.planted.get(client, -1) for client in clients]),
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
            file.write(buffer.getbuffer())
        self._written = len(self.rounds)

    def rewind(self, server_round: int) -> None:
        """Read back the rounds up to this one, to continue from there."""
        path = self.directory.path / "fusion.npz"
        if not path.exists():
            return
        with np.load(path) as stored:
            arrays = {name: torch.from_numpy(stored[name]) for name in stored.files}
        for r, number in enumerate(arrays["rounds"].tolist()):
            if number > server_round:
                break
            known = ~arrays["weights"][r].isnan()
            posterior = FusionPosterior(
                arrays["assignments"][r, known],
                arrays["inferred_mixture"][r],
                arrays["components"][r],
                elbo=0.0,
            )
            self.rounds.append(number)
            self.snapshots.append(
                FusionSnapshot(
                    arrays["clients"][known].tolist(),
                    posterior,
                    arrays["mixture"][r],
                    arrays["weights"][r, known],
                )
            )


@dataclass(frozen=True)
class Best:
    """The best value so far and its round; 0 before there is one."""

    value: float | None = None
    server_round: int = 0


class BestModel:
    """``best_model.safetensors``: the served model of the best round.

    Parameters
    ----------
    directory : RunDirectory
        Where it is written.
    metric : str
        The metric that decides, measured on the model that is saved; of a loss, smaller is better.
        Rounds without it do not count.
    """

    def __init__(self, directory: RunDirectory, metric: str = "global-accuracy") -> None:
        self.directory = directory
        self.metric = metric
        self.state = Best()

    def on_round_end(self, report: RoundReport) -> None:
        """Save the round's model if it is the best so far; the first of equals stays."""
        value = report.metrics.get(self.metric)
        if value is None or not math.isfinite(value) or report.server_round == 0:
            return
        sign = -1 if self.metric.endswith("loss") else 1
        best = self.state.value
        if best is None or sign * value > sign * best:
            self.state = Best(value, report.server_round)
            self.directory.write_state(
                "best_model.safetensors",
                report.model,
                **{"round": report.server_round, self.metric: value},
            )


class EarlyStopping:
    """Ends a run that no longer improves.

    Parameters
    ----------
    best : BestModel
        Knows the best round; must come before this one among the callbacks.
    patience : int
        Rounds without an improvement that are allowed, at least 1.
    """

    def __init__(self, best: BestModel, patience: int) -> None:
        self.best = best
        self.patience = patience

    def on_round_end(self, report: RoundReport) -> None:
        """Raise `StopRun` when the patience has run out."""
        best = self.best.state
        if best.server_round and report.server_round - best.server_round >= self.patience:
            raise StopRun(
                f"no {self.best.metric} better than {best.value:.4f} of round {best.server_round} "
                f"in {self.patience} rounds"
            )


def _round_of(line: str) -> float:
    try:
        return float(json.loads(line)["round"])
    except (ValueError, KeyError, TypeError):
        return math.inf


def _client_row(server_round: int, row: dict[str, Any]) -> dict[str, Any]:
    metrics = row.pop("metrics")
    flat = {key.replace("_", "-"): value for key, value in row.items() if value is not None}
    flat = {"round": server_round, **flat}
    return flat | {key: value for key, value in metrics.items() if key not in flat}
