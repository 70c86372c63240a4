# SPDX-License-Identifier: Apache-2.0
"""Callbacks that write the rows, inferences and best model of a run, or end it early."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from fedfusion_flwr.federation.round import ClientRow, RoundReport, StopRun
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
        clients = (_client_row(report.server_round, client) for client in report.clients)
        self.directory.append_json("clients.jsonl", *clients)

    def rewind(self, server_round: int) -> None:
        """Forget the rounds after this one, and a truncated line."""
        for name in ("metrics.jsonl", "clients.jsonl"):
            path = self.directory.path / name
            lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
            kept = (line for line in lines if _round_of(line) <= server_round)
            self.directory.write_lines(name, kept)


_BY_CLIENT = ("assignments", "weights")
_BY_ROUND = ("mixture", "inferred_mixture", "components")
ARCHIVE_GROWTH = 1 / 16
"""``fusion.npz`` grows by this share before it is rewritten: rewriting it in every round would make
rounds slower as the run gets longer."""


class FusionArchive:
    """``fusion.npz``: the inference of every round, padded with NaN for clients not known yet.

    ``rounds`` (R,), ``clients`` (K,), ``assignments`` (R, K, M), ``mixture`` (R, M) as used,
    ``inferred_mixture`` (R, M), ``weights`` (R, K), ``components`` (R, M, D). Of the last round
    only: ``statistics`` (K, D), the inputs of the inference, in the units of ``components``;
    ``planted`` (K,), the true main component, -1 if unknown; and, if components are planted,
    ``planted_mixtures`` (K, M of the partition), the true mixtures, NaN if unknown.

    During a run the file may lack up to `ARCHIVE_GROWTH` of the rounds; `write` adds them.
    """

    def __init__(self, directory: RunDirectory) -> None:
        self.directory = directory
        self.rows: list[dict[str, Any]] = []
        """One of each round with an inference, with its clients' rows in their order."""
        self.statistics: np.ndarray | None = None
        self.planted: dict[int, int] = {}
        self.planted_mixtures: dict[int, np.ndarray] = {}
        self._written = 0

    def on_round_end(self, report: RoundReport) -> None:
        """Add the round, if there was an inference; rewrite the file if it lacks enough rounds."""
        fusion = report.fusion
        if fusion is None:
            return
        self.rows.append(
            {
                "round": report.server_round,
                "clients": np.array(fusion.clients, np.int64),
                "assignments": fusion.posterior.assignments.numpy(),
                "weights": fusion.weights.numpy(),
                "mixture": fusion.mixture.numpy(),
                "inferred_mixture": fusion.posterior.mixture.numpy(),
                "components": fusion.posterior.components.numpy().astype(np.float32),
            }
        )
        # Statistics may be wide: those of earlier rounds are dropped.
        self.statistics = None if fusion.statistics is None else fusion.statistics.numpy()
        self.planted, self.planted_mixtures = report.planted, report.planted_mixtures
        if len(self.rows) - self._written > ARCHIVE_GROWTH * self._written:
            self.write()

    def write(self) -> None:
        """Rewrite the file if it lacks any round."""
        if self._written == len(self.rows):
            return
        clients = np.unique(np.concatenate([row["clients"] for row in self.rows]))

        def padded(row: dict[str, Any], values: np.ndarray, kind: type = np.float64) -> np.ndarray:
            wide = np.full((len(clients), *values.shape[1:]), np.nan, kind)
            wide[np.searchsorted(clients, row["clients"])] = values
            return wide

        arrays = {}
        if self.statistics is not None:
            arrays["statistics"] = padded(self.rows[-1], self.statistics, np.float32)
        arrays["planted"] = np.array([self.planted.get(client, -1) for client in clients.tolist()])
        if self.planted_mixtures:
            unknown = np.full_like(next(iter(self.planted_mixtures.values())), np.nan)
            arrays["planted_mixtures"] = np.stack(
                [self.planted_mixtures.get(client, unknown) for client in clients.tolist()]
            )
        arrays["rounds"] = np.array([row["round"] for row in self.rows])
        arrays["clients"] = clients
        for name in _BY_CLIENT:
            arrays[name] = np.stack([padded(row, row[name]) for row in self.rows])
        for name in _BY_ROUND:
            arrays[name] = np.stack([row[name] for row in self.rows])
        with self.directory.writing("fusion.npz") as file:
            np.savez(file, allow_pickle=False, **arrays)
        self._written = len(self.rows)

    def rewind(self, server_round: int) -> None:
        """Read back the rounds up to this one, to continue from there."""
        path = self.directory.path / "fusion.npz"
        if not path.exists():
            return
        with np.load(path) as stored:
            arrays = dict(stored)
        clients = arrays["clients"].tolist()
        planted = zip(clients, arrays["planted"].tolist(), strict=True)
        self.planted = {client: component for client, component in planted if component >= 0}
        if "planted_mixtures" in arrays:
            mixtures = zip(clients, arrays["planted_mixtures"], strict=True)
            self.planted_mixtures = {
                client: mixture for client, mixture in mixtures if not np.isnan(mixture).any()
            }
        for r in np.flatnonzero(arrays["rounds"] <= server_round):
            known = ~np.isnan(arrays["weights"][r])
            row = {"round": int(arrays["rounds"][r]), "clients": arrays["clients"][known]}
            row |= {name: arrays[name][r, known] for name in _BY_CLIENT}
            self.rows.append(row | {name: arrays[name][r] for name in _BY_ROUND})
            if r == len(arrays["rounds"]) - 1:
                # No later round may have an inference, so these are kept, too.
                self.statistics = arrays["statistics"][known] if "statistics" in arrays else None
                clients, planted = arrays["clients"].tolist(), arrays["planted"].tolist()
                self.planted = dict(zip(clients, planted, strict=True))


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


def _client_row(server_round: int, client: ClientRow) -> dict[str, Any]:
    known = {key: value for key, value in dataclasses.asdict(client).items() if value is not None}
    metrics = known.pop("metrics")
    flat = {"round": server_round, **{key.replace("_", "-"): known[key] for key in known}}
    return flat | {key: value for key, value in metrics.items() if key not in flat}
