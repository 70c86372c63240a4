# SPDX-License-Identifier: Apache-2.0
"""What is measured of feature bias, as numbers that can be written down and read back."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from fedfusion_flwr.report.evidence import ReportError, Row, Setting
from fedfusion_flwr.report.feature_bias import share_outside
from fedfusion_flwr.report.pictures import CENTRALIZED

MOST_VALUES = 201
"""Most values that are kept, and drawn, of one distribution: no picture shows more."""
_DIGITS = 6


@dataclass(frozen=True)
class RunningValues:
    """What is drawn of a model's running statistics.

    Attributes
    ----------
    channels : int
        Of all its BatchNorm layers.
    outside : float
        `share_outside` of all values.
    means, deviations : list[float]
        In ascending order, six digits of each: one for every channel, or, of more than
        `MOST_VALUES` channels, as many quantiles, evenly spaced from least to greatest.
    """

    channels: int
    outside: float
    means: list[float]
    deviations: list[float]

    @classmethod
    def of(cls, means: np.ndarray, deviations: np.ndarray) -> RunningValues:
        """What is kept of all values, (C,) each."""
        outside = share_outside(np.concatenate([means, deviations]))
        return cls(len(means), outside, _thinned(means), _thinned(deviations))

    @property
    def shares(self) -> np.ndarray:
        """The share of the channels below or at each kept value, ascending."""
        if self.channels > MOST_VALUES:
            return np.linspace(0, 1, MOST_VALUES)
        return (np.arange(self.channels) + 1) / self.channels


@dataclass(frozen=True)
class Bias:
    """The measures of one strategy in one setting, a number a run.

    ``strategy`` is ``centralized`` for the floor: two centralized models of one seed that differ in
    the order of their batches.
    """

    strategy: str
    divergence: list[float]
    reverse: list[float]
    distances: list[list[float]]
    gaps: list[float]

    def mean_distances(self) -> list[float]:
        """`feature_distance`, mean over the layers that tell examples apart, of every run."""
        told = [[value for value in layers if not np.isnan(value)] for layers in self.distances]
        return [float(np.mean(layers)) for layers in told if layers]

    @classmethod
    def joined(cls, strategy: str, parts: Iterable[Bias]) -> Bias:
        """The measures of several runs, one after the other; there may be none."""
        parts = list(parts)
        return cls(
            strategy,
            [value for part in parts for value in part.divergence],
            [value for part in parts for value in part.reverse],
            [layers for part in parts for layers in part.distances],
            [value for part in parts for value in part.gaps],
        )


@dataclass(frozen=True)
class BiasRow:
    """What was measured on one run, or on the centralized models of one seed: the floor.

    Attributes
    ----------
    setting : Setting
        With the group that the suite names.
    seed : int
        Of the run, or of the centralized models.
    bias : Bias
        The measures, with the strategy.
    values : RunningValues or None
        Of the run's model, or of the first centralized one; None where it has none.
    references : list[str]
        Digests of the centralized models that had a part in it.
    cell, digest : str
        Of the run; empty for the floor.
    """

    setting: Setting
    seed: int
    bias: Bias
    values: RunningValues | None
    references: list[str]
    cell: str = ""
    digest: str = ""

    @property
    def key(self) -> tuple[Setting, str, str, int]:
        """What has one row: measured again, it replaces the old one."""
        return self.setting, self.bias.strategy, self.cell, self.seed

    def to_row(self) -> Row:
        """One line of the file; what is not finite is null."""
        values = self.values or RunningValues(0, 0.0, [], [])
        return {
            "cell": self.cell or None,
            "strategy": self.bias.strategy,
            "dataset": self.setting.dataset,
            "model": self.setting.model,
            "partition": self.setting.partition,
            "seed": self.seed,
            "group": self.setting.group,
            "digest": self.digest or None,
            "references": self.references,
            "divergence": _plain(self.bias.divergence),
            "divergence-reversed": _plain(self.bias.reverse),
            "feature-distances": [_plain(layers) for layers in self.bias.distances],
            "statistics-gaps": _plain(self.bias.gaps),
            "channels": values.channels,
            "share-outside": self.values and values.outside,
            "running-means": _plain(values.means),
            "running-deviations": _plain(values.deviations),
        }

    @classmethod
    def from_row(cls, row: Row) -> BiasRow:
        """Read a line.

        Raises
        ------
        ReportError
            If a key is missing or holds something else than `to_row` writes.
        """
        names = [_of(row, key, str) for key in ("dataset", "model", "partition", "group")]
        distances = [_numbers(layers, "feature-distances") for layers in
                     _of(row, "feature-distances", list)]  # fmt: skip
        if len({len(layers) for layers in distances}) > 1:
            raise ReportError("has more layers in one list of 'feature-distances' than in another")
        bias = Bias(
            _of(row, "strategy", str),
            _numbers(row.get("divergence"), "divergence"),
            _numbers(row.get("divergence-reversed"), "divergence-reversed"),
            distances,
            _numbers(row.get("statistics-gaps"), "statistics-gaps"),
        )
        channels = _of(row, "channels", int)
        values = RunningValues(
            channels,
            float(_of(row, "share-outside", int | float | None) or 0),
            _numbers(row.get("running-means"), "running-means"),
            _numbers(row.get("running-deviations"), "running-deviations"),
        )
        kept = min(channels, MOST_VALUES)
        if {len(values.means), len(values.deviations)} != {kept}:
            raise ReportError(f"has not {kept} running values of its {channels} channels")
        references = _of(row, "references", list)
        if not references or not all(isinstance(digest, str) for digest in references):
            raise ReportError("has no list of digests as references")
        cell, digest = (_of(row, key, str | None) or "" for key in ("cell", "digest"))
        if (cell == "") != (bias.strategy == CENTRALIZED) or (cell == "") != (digest == ""):
            raise ReportError("has a cell without digest, or the other way round")
        return cls(
            Setting(*names),
            _of(row, "seed", int),
            bias,
            values if channels else None,
            references,
            cell,
            digest,
        )


def _thinned(values: np.ndarray) -> list[float]:
    ordered = np.sort(values)
    if len(ordered) > MOST_VALUES:
        ordered = np.quantile(ordered, np.linspace(0, 1, MOST_VALUES))
    return [float(f"{v:.{_DIGITS}g}") if math.isfinite(v) else math.nan for v in ordered]


def _plain(values: list[float]) -> list[float | None]:
    return [value if math.isfinite(value) else None for value in values]


def _of(row: Row, key: str, kind: Any) -> Any:
    if key not in row:
        raise ReportError(f"lacks '{key}'")
    if not isinstance(row[key], kind) or isinstance(row[key], bool):
        raise ReportError(f"has no valid '{key}'")
    return row[key]


def _numbers(values: Any, key: str) -> list[float]:
    if not isinstance(values, list) or not all(
        value is None or (isinstance(value, int | float) and not isinstance(value, bool))
        for value in values
    ):
        raise ReportError(f"has no list of numbers as '{key}'")
    return [math.nan if value is None else float(value) for value in values]
