# SPDX-License-Identifier: Apache-2.0
"""Feature bias: measured at the end of a job, kept in its row, read back for the pictures."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pandas import DataFrame
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from fedfusion_flwr.computation import choose_device
from fedfusion_flwr.config import RunConfig
from fedfusion_flwr.data import central_test_data, data_for
from fedfusion_flwr.errors import FedFusionError
from fedfusion_flwr.experiments.measures import (
    feature_distance,
    histogram_divergence,
    layer_features,
    running_values,
    share_outside,
    statistics_gap,
)
from fedfusion_flwr.experiments.results import CENTRALIZED, Results, Setting, first_of, rounded
from fedfusion_flwr.experiments.rows import ResultsError, Row
from fedfusion_flwr.fusion import NormalizationStatistics, StatisticsError
from fedfusion_flwr.models import model_for
from fedfusion_flwr.models.resize import fit_to_state

TEST_IMAGES = 1000
"""Examples of the test set, evenly spaced, on which features are measured."""
MOST_VALUES = 201
"""Most values of one distribution that a row keeps: no picture shows more."""
_BATCH = 250
_DIGITS, _DIGITS_DRAWN = 6, 4


# --- in the job -----------------------------------------------------------------------------------


def measure_bias(
    config: Mapping[str, Any],
    state: Mapping[str, Tensor],
    references: Sequence[Mapping[str, Any]],
    drawn: bool,
) -> Row:
    """Compare a model with models that were trained on the pooled data.

    Parameters
    ----------
    config : Mapping
        Run-config overrides: of the model, and of the test examples.
    state : dict[str, Tensor]
        The model's state dict.
    references : sequence of Mapping
        ``config``, ``model_file`` and ``digest`` of each.
    drawn : bool
        Whether to keep the running values as well, which a picture shows of one seed.

    Returns
    -------
    Row
        ``references``: their digests; ``divergence`` and ``divergence-reversed`` (nats): a value
        for each, empty without running statistics; ``feature-distances``: a list of layers for
        each; ``statistics-gap`` or None; ``channels`` and ``share-outside``; if drawn,
        ``running-means`` and ``running-deviations``. If a reference or the data cannot be
        loaded, only ``missing``, a sentence.
    """
    try:
        return _measured(RunConfig.from_run_config(config), state, references, drawn)
    except (FedFusionError, OSError) as problem:
        return {"missing": str(problem)}


def _measured(
    config: RunConfig,
    state: Mapping[str, Tensor],
    references: Sequence[Mapping[str, Any]],
    drawn: bool,
) -> Row:
    x, _ = central_test_data(config)
    # Evenly spaced: test sets may be sorted by class.
    examples = x[torch.linspace(0, len(x) - 1, min(len(x), TEST_IMAGES)).long()]
    batches = torch.split(examples.to(choose_device("auto")), _BATCH)
    model, values = _loaded(config, state), _running(state)
    own = layer_features(model, batches).values()
    row: Row = {
        "references": [reference["digest"] for reference in references],
        "divergence": [],
        "divergence-reversed": [],
        "feature-distances": [],
        "statistics-gap": _gap(state, model, batches),
    }
    for reference in references:
        other = _state_of(Path(reference["model_file"]))
        others = RunConfig.from_run_config({**reference["config"], "data-root": config.data_root})
        features = layer_features(_loaded(others, other), batches).values()
        distances = [feature_distance(a, b) for a, b in zip(own, features, strict=False)]
        row["feature-distances"].append([rounded(distance) for distance in distances])
        theirs = _running(other)
        if values is not None and theirs is not None:
            p, q = np.concatenate(values), np.concatenate(theirs)
            row["divergence"].append(rounded(histogram_divergence(p, q)))
            row["divergence-reversed"].append(rounded(histogram_divergence(q, p)))
    if values is not None:
        row["channels"] = len(values[0])
        row["share-outside"] = rounded(share_outside(np.concatenate(values)))
        if drawn:
            row["running-means"], row["running-deviations"] = map(thinned, values)
    return row


def _loaded(config: RunConfig, state: Mapping[str, Tensor]) -> torch.nn.Module:
    """The model with these weights; on a GPU if there is one."""
    model = fit_to_state(model_for(config, data_for(config), seed=0), state)
    model.load_state_dict(state)
    return model.eval().to(choose_device("auto"))


def _running(state: Mapping[str, Tensor]) -> tuple[np.ndarray, np.ndarray] | None:
    try:
        return running_values(state)
    except StatisticsError:
        return None


def _gap(
    state: Mapping[str, Tensor], model: torch.nn.Module, batches: Sequence[Tensor]
) -> float | None:
    try:
        carried = NormalizationStatistics.from_state_dict(state)
        found = NormalizationStatistics.probe(model, batches)
    except StatisticsError:
        return None
    return rounded(statistics_gap(carried, found))


def _state_of(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except SafetensorError as problem:
        raise FedFusionError(f"'{path}' is damaged ({problem})") from problem


def thinned(values: np.ndarray) -> list[float | int | None]:
    """Values in ascending order; of more than `MOST_VALUES` as many evenly spaced quantiles."""
    ordered = np.sort(values)
    if len(ordered) > MOST_VALUES:
        ordered = np.quantile(ordered, np.linspace(0, 1, MOST_VALUES))
    return [rounded(float(value), _DIGITS_DRAWN) for value in ordered]


# --- in the report --------------------------------------------------------------------------------


@dataclass(frozen=True)
class RunningValues:
    """What is drawn of a model's running statistics; see `thinned`.

    ``outside`` is the `share_outside` of all values.
    """

    channels: int
    outside: float
    means: list[float]
    deviations: list[float]

    @property
    def shares(self) -> np.ndarray:
        """The share of the channels below or at each kept value, ascending."""
        if self.channels > MOST_VALUES:
            return np.linspace(0, 1, MOST_VALUES)
        return (np.arange(self.channels) + 1) / self.channels


@dataclass(frozen=True)
class SettingBias:
    """Feature bias in one setting.

    Attributes
    ----------
    setting : Setting
        The setting.
    strategies : list[str]
        Those that were measured, in the order of the rows; without the floor.
    measures : DataFrame
        ``strategy``, ``run``, ``measure`` and ``value``. ``centralized`` is the floor: pairs of
        references of one seed that differ in the order of their batches, compared both ways.
    layers : DataFrame
        ``strategy``, ``layer`` (from 1) and ``feature-distance``, mean over runs.
    values : dict[str, RunningValues]
        Of the first model of each strategy that has any.
    """

    setting: Setting
    strategies: list[str]
    measures: DataFrame
    layers: DataFrame
    values: dict[str, RunningValues]

    def of(self, measure: str, strategy: str) -> list[float]:
        """A measure of a strategy, a value a run."""
        found = self.measures
        wanted = (found["measure"] == measure) & (found["strategy"] == strategy)
        return [float(value) for value in found.loc[wanted, "value"]]


def read_bias(results: Results, setting: Setting, runs: DataFrame) -> tuple[SettingBias, list[str]]:
    """What the rows of a setting hold of feature bias, and sentences on what cannot be used.

    Runs whose seed has no reference are left out, unless that is so of all runs.

    Raises
    ------
    ResultsError
        If there is nothing to show; the sentence says why.
    """
    pooled = results.references_for(setting)
    if pooled.empty:
        raise ResultsError("no centralized model of this data and model")
    known, foreign, complaints = set(pooled["digest"]), [], []
    found: list[tuple[str, int, Row]] = []
    for cell, strategy, seed, row in _rows_of(runs, "cell", "strategy", "seed"):
        if not row["references"] or not known.issuperset(row["references"]):
            foreign.append(cell)
        else:
            found.append((strategy, seed, row))
    complaints += _reasons(runs)
    if foreign:
        complaints.append(
            f"{len(foreign)} runs were measured on other centralized models than those of this "
            f"folder ({first_of(foreign)})"
        )
    if not found:
        raise ResultsError("; ".join(complaints) or "no feature bias in the rows of its runs")
    of_seeds = [one for one in found if one[1] in set(pooled["seed"])] or found
    rows = {strategy: [r for s, _, r in of_seeds if s == strategy] for strategy, *_ in of_seeds}
    floor = [row for _, row in _rows_of(pooled, "seed")]
    table: list[Row] = [*_measures({CENTRALIZED: floor}, both=True), *_measures(rows)]
    by_strategy = {CENTRALIZED: floor, **rows}
    values = {name: drawn for name, of in by_strategy.items() if (drawn := _drawn(of)) is not None}
    layers = DataFrame(_layers(by_strategy), columns=["strategy", "layer", "feature-distance"])
    return SettingBias(setting, list(rows), DataFrame(table), layers, values), complaints


def _rows_of(frame: DataFrame, *names: str) -> Iterator[tuple[Any, ...]]:
    """Some columns of the lines whose bias was measured, and the bias."""
    if "bias" in frame:
        for *told, bias in frame[[*names, "bias"]].itertuples(index=False):
            if isinstance(bias, dict) and "feature-distances" in bias:
                yield *told, bias


def _reasons(runs: DataFrame) -> list[str]:
    told = runs.get("bias", [])
    return list(dict.fromkeys(b["missing"] for b in told if isinstance(b, dict) and "missing" in b))


def _measures(rows: Mapping[str, Sequence[Row]], both: bool = False) -> Iterator[Row]:
    """The lines of `SettingBias.measures`: means over the references, or each pair both ways."""
    for strategy, of in rows.items():
        columns: dict[str, list[float]] = {
            "divergence": [],
            "feature-distance": [],
            "statistics-gap": [],
            "divergence-reversed": [],
        }
        for row in of:
            ways = [row["divergence"], row["divergence-reversed"]]
            pairs = list(zip(*ways, strict=True))
            if both:
                columns["divergence"] += [value for pair in pairs for value in pair]
                columns["divergence-reversed"] += [v for pair in pairs for v in reversed(pair)]
                columns["feature-distance"] += map(_mean, row["feature-distances"])
            else:
                if pairs:
                    columns["divergence"].append(_mean(ways[0]))
                    columns["divergence-reversed"].append(_mean(ways[1]))
                columns["feature-distance"].append(_mean(_mean_layers([row])))
            columns["statistics-gap"].append(_mean([row["statistics-gap"]]))
        for measure, values in columns.items():
            told = [value for value in values if not math.isnan(value)]
            for i, value in enumerate(told):
                yield {"measure": measure, "strategy": strategy, "run": i, "value": value}


def _layers(rows: Mapping[str, Sequence[Row]]) -> Iterator[Row]:
    for strategy, of in rows.items():
        for number, value in enumerate(_mean_layers(of), 1):
            yield {"strategy": strategy, "layer": number, "feature-distance": value}


def _mean_layers(rows: Sequence[Row]) -> list[float]:
    """The distance of every layer, mean over runs and references; NaN if one does not know it."""
    lists = [layers for row in rows for layers in row["feature-distances"]]
    if not lists or not lists[0]:
        return []
    return [float(value) for value in np.array(lists, dtype=float).mean(0)]


def _mean(values: Sequence[float | None]) -> float:
    """The mean of the values that are there; NaN of none."""
    told = [value for value in values if value is not None and not math.isnan(value)]
    return float(np.mean(told)) if told else math.nan


def _drawn(rows: Sequence[Row]) -> RunningValues | None:
    for row in rows:
        if row.get("running-means"):
            pair = [
                [math.nan if value is None else float(value) for value in row[name]]
                for name in ("running-means", "running-deviations")
            ]
            return RunningValues(row["channels"], float(row["share-outside"] or 0), *pair)
    return None
