# SPDX-License-Identifier: Apache-2.0
"""Feature bias: measured at the end of a job, kept in its row, read back for the pictures."""

from __future__ import annotations

import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from pandas import DataFrame, Series
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
        ``running-means`` and ``running-deviations``. If this cannot be measured, only
        ``missing``, the reason.
    """
    try:
        return _measured(RunConfig.from_run_config(config), state, references, drawn)
    except (FedFusionError, OSError) as problem:
        return {"missing": str(problem)}
    except Exception as problem:  # noqa: BLE001 - a run of hours is not lost for it
        traceback.print_exc()
        return {"missing": f"{type(problem).__name__}: {problem}"}


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
    model = fit_to_state(model_for(config, data_for(config)), state)
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
class _Measured:
    """A row's bias: divergences (R,), distances (R, layers) from R references, NaN if unknown."""

    references: list[str]
    divergence: np.ndarray
    reverse: np.ndarray
    distances: np.ndarray
    gap: float
    outside: float
    running: DataFrame

    @classmethod
    def read(cls, row: Row) -> _Measured:
        names = ("divergence", "divergence-reversed", "feature-distances")
        divergence, reverse, distances = (np.array(row[name], dtype=float) for name in names)
        if divergence.shape != reverse.shape or divergence.ndim != 1 or distances.ndim == 0:
            raise ValueError("lists of different lengths")
        gap, outside = (np.nan if (v := row.get(name)) is None else float(v)
                        for name in ("statistics-gap", "share-outside"))  # fmt: skip
        running = _running_values(row) if row.get("running-means") else DataFrame()
        return cls(list(row["references"]), divergence, reverse, distances, gap, outside, running)


def _running_values(row: Row) -> DataFrame:
    """``statistic``, ``value`` and ``share``, that of the channels below or at the value."""
    count, parts = row["channels"], []
    for kind in ("mean", "deviation"):
        values = np.array(row[f"running-{kind}s"], dtype=float)
        shares = np.arange(1, len(values) + 1) / count
        if count > MOST_VALUES:
            shares = np.linspace(0, 1, MOST_VALUES)
        parts.append(DataFrame({"statistic": f"running {kind}", "value": values, "share": shares}))
    return pd.concat(parts)


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
    running : DataFrame
        ``strategy``, ``statistic``, ``value`` and ``share`` (of the channels below or at it), of
        the first model of each strategy that has running statistics.
    """

    setting: Setting
    strategies: list[str]
    measures: DataFrame
    layers: DataFrame
    running: DataFrame

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
    complaints: list[str] = []
    floor = [measured for _, measured in _read_all(pooled.assign(cell="a reference"), complaints)]
    known, found, foreign = set(pooled["digest"]), [], []
    for index, measured in _read_all(runs, complaints):
        if measured.references and known.issuperset(measured.references):
            found.append((runs.loc[index, "strategy"], runs.loc[index, "seed"], measured))
        else:
            foreign.append(runs.loc[index, "cell"])
    if foreign:
        complaints.append(
            f"{len(foreign)} runs were measured on other centralized models than those of this "
            f"folder ({first_of(foreign)})"
        )
    if not found:
        raise ResultsError("; ".join(complaints) or "no run was compared with a centralized model")
    found = [one for one in found if one[1] in set(pooled["seed"])] or found
    by_strategy = {CENTRALIZED: floor}
    for strategy, _, measured in found:
        by_strategy.setdefault(strategy, []).append(measured)
    measures = DataFrame(line for name, of in by_strategy.items() for line in _measures(name, of))
    layers = DataFrame(_layers(by_strategy), columns=["strategy", "layer", "feature-distance"])
    first = {
        name: drawn[0]
        for name, of in by_strategy.items()
        if (drawn := [one for one in of if not one.running.empty])
    }
    parts = [one.running.assign(strategy=name) for name, one in first.items()]
    outside = DataFrame({"strategy": name, "value": one.outside} for name, one in first.items())
    measures = pd.concat([measures, outside.assign(measure="share-outside", run=0)])
    running = pd.concat(parts) if parts else DataFrame()
    return SettingBias(setting, [*by_strategy][1:], measures, layers, running), complaints


def _read_all(frame: DataFrame, complaints: list[str]) -> Iterator[tuple[Any, _Measured]]:
    """The bias of each line, with its index; sentences on those that have none that is usable."""
    for index, bias in frame.get("bias", Series()).items():
        if isinstance(bias, dict) and "missing" in bias:
            if bias["missing"] not in complaints:
                complaints.append(bias["missing"])
        elif isinstance(bias, dict):
            try:
                yield index, _Measured.read(bias)
            except (KeyError, TypeError, ValueError) as problem:
                name = frame.loc[index, "cell"]
                complaints.append(f"the feature bias of {name} is damaged ({problem})")


def _measures(strategy: str, rows: Sequence[_Measured]) -> Iterator[Row]:
    """The lines of `SettingBias.measures`: means over the references, or each pair both ways."""
    columns: dict[str, list[float]] = {"divergence": [], "feature-distance": [],
                                       "statistics-gap": [], "divergence-reversed": []}  # fmt: skip
    for row in rows:
        columns["statistics-gap"].append(row.gap)
        pairs = np.stack([row.divergence, row.reverse], 1)
        if strategy == CENTRALIZED:
            columns["divergence"] += pairs.ravel().tolist()
            columns["divergence-reversed"] += pairs[:, ::-1].ravel().tolist()
            columns["feature-distance"] += map(_mean, row.distances)
        else:
            columns["divergence"].append(_mean(row.divergence))
            columns["divergence-reversed"].append(_mean(row.reverse))
            columns["feature-distance"].append(_mean(row.distances.mean(0)))
    for measure, values in columns.items():
        for number, value in enumerate(value for value in values if not np.isnan(value)):
            yield {"measure": measure, "strategy": strategy, "run": number, "value": value}


def _layers(rows: Mapping[str, Sequence[_Measured]]) -> Iterator[tuple[str, int, float]]:
    for strategy, of in rows.items():
        distances = [one.distances for one in of if one.distances.size]
        if distances:
            for number, value in enumerate(np.concatenate(distances).mean(0), 1):
                yield strategy, number, float(value)


def _mean(values: np.ndarray) -> float:
    """The mean of the values that are there; NaN of none."""
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else float("nan")
