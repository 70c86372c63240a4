# SPDX-License-Identifier: Apache-2.0
"""The measures of feature bias, on the models that a suite has kept."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from fedfusion_flwr.config import RunConfig
from fedfusion_flwr.data import central_test_data, data_for
from fedfusion_flwr.errors import FedFusionError
from fedfusion_flwr.fusion import NormalizationStatistics, StatisticsError
from fedfusion_flwr.models import model_for
from fedfusion_flwr.models.resize import fit_to_state
from fedfusion_flwr.report.evidence import Cell, Evidence, Reference, Setting
from fedfusion_flwr.report.feature_bias import (
    feature_distance,
    histogram_divergence,
    layer_features,
    running_values,
    statistics_gap,
)
from fedfusion_flwr.report.pictures import CENTRALIZED

TEST_IMAGES = 1000
"""Examples of the test set, evenly spaced, on which features are measured."""
_BATCH = 250
_MODEL = "final_model.safetensors"


@dataclass(frozen=True, eq=False)
class Measured:
    """One trained model and what its features are like on a setting's test examples."""

    seed: int
    state: Mapping[str, Tensor]
    config: RunConfig

    @cached_property
    def values(self) -> tuple[np.ndarray, np.ndarray] | None:
        """Running means and standard deviations; None for a model without any."""
        try:
            return running_values(self.state)
        except StatisticsError:
            return None

    @cached_property
    def model(self) -> torch.nn.Module:
        """The model, its weights loaded."""
        model = model_for(self.config, data_for(self.config), seed=0)
        model = fit_to_state(model, self.state)
        model.load_state_dict(self.state)
        return model.eval()

    def features(self, examples: Tensor) -> list[Tensor]:
        """Channel means (N, C) of every normalization layer's input, in the model's order."""
        return list(layer_features(self.model, _batches(examples)).values())

    def gap(self, examples: Tensor) -> float | None:
        """`statistics_gap` of the model; None where it carries no statistics."""
        try:
            carried = NormalizationStatistics.from_state_dict(self.state)
            found = NormalizationStatistics.probe(self.model, _batches(examples))
        except StatisticsError:
            return None
        return statistics_gap(carried, found)


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


@dataclass(frozen=True)
class SettingBias:
    """Feature bias in one setting: the floor first, then the strategies; and a model of each."""

    setting: Setting
    rows: list[Bias]
    models: dict[str, Measured]


def measure(evidence: Evidence, setting: Setting, cells: list[Cell]) -> SettingBias:
    """All measures of one setting.

    Runs whose seed has centralized models are compared with those, which began as the same model;
    only if there are no such runs, all are compared with all.

    Raises
    ------
    FedFusionError
        If there is nothing to compare, or data or a model cannot be loaded.
    """
    pooled = [r for r in evidence.references_for(setting) if r.model_file is not None]
    if not pooled:
        raise FedFusionError("no centralized model of this data and model was kept")
    kept = [
        (file, cell)
        for cell in cells
        if cell.directory is not None and (file := cell.directory / _MODEL).exists()
    ]
    if not kept:
        raise FedFusionError(f"no run directory with a {_MODEL} was kept")
    seeds = {reference.seed for reference in pooled}
    # A centralized model began as the runs of its seed did: where there are such, only those.
    kept = [(file, c) for file, c in kept if c.seed in seeds] or kept
    local = {"data-root": _run_config(*kept[0]).data_root}
    examples = _examples(_run_config(*kept[0]))
    centralized = [_measured_reference(reference, local) for reference in pooled]
    features = [model.features(examples) for model in centralized]
    models = {CENTRALIZED: centralized[0]}
    rows = [_floor(centralized, features, examples)]
    by_strategy: dict[str, list[Measured]] = {}
    for file, cell in kept:
        model = Measured(cell.seed, _load(file), _run_config(file, cell))
        by_strategy.setdefault(cell.strategy, []).append(model)
        models.setdefault(cell.strategy, model)
    for strategy, runs in by_strategy.items():
        found = [_compared(run, run.features(examples), centralized, features) for run in runs]
        rows.append(
            Bias(
                strategy,
                [pair[0] for run in found if (pair := run[0]) is not None],
                [pair[1] for run in found if (pair := run[0]) is not None],
                [run[1] for run in found],
                [gap for run in runs if (gap := run.gap(examples)) is not None],
            )
        )
    return SettingBias(setting, rows, models)


def _compared(
    run: Measured,
    own: list[Tensor],
    centralized: list[Measured],
    features: list[list[Tensor]],
) -> tuple[tuple[float, float] | None, list[float]]:
    """Both directions of the divergence, and the layers' distances: means over the references."""
    same_seed = [i for i, model in enumerate(centralized) if model.seed == run.seed]
    chosen = same_seed or range(len(centralized))
    distances = [_distances(own, features[i]) for i in chosen]
    pairs = [p for i in chosen if (p := _divergences(run, centralized[i])) is not None]
    both = np.mean(pairs, axis=0) if pairs else None
    divergence = None if both is None else (float(both[0]), float(both[1]))
    return divergence, [float(value) for value in np.mean(distances, axis=0)]


def _floor(centralized: list[Measured], features: list[list[Tensor]], examples: Tensor) -> Bias:
    pairs = [
        (i, j)
        for i in range(len(centralized))
        for j in range(len(centralized))
        if i < j and centralized[i].seed == centralized[j].seed
    ]
    both = [p for i, j in pairs if (p := _divergences(centralized[i], centralized[j])) is not None]
    gaps = [gap for model in centralized if (gap := model.gap(examples)) is not None]
    return Bias(
        CENTRALIZED,
        [value for pair in both for value in pair],
        [value for pair in both for value in reversed(pair)],
        [_distances(features[i], features[j]) for i, j in pairs],
        gaps,
    )


def _divergences(one: Measured, other: Measured) -> tuple[float, float] | None:
    if one.values is None or other.values is None:
        return None
    p, q = np.concatenate(one.values), np.concatenate(other.values)
    return histogram_divergence(p, q), histogram_divergence(q, p)


def _distances(one: list[Tensor], other: list[Tensor]) -> list[float]:
    return [feature_distance(x, y) for x, y in zip(one, other, strict=False)]


def _load(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except SafetensorError as problem:
        raise FedFusionError(f"'{path}' is damaged ({problem})") from problem


def _run_config(file: Path, cell: Cell) -> RunConfig:
    """As the run had it: a suite's row does not say where the data lies."""
    own = file.with_name("config.json")
    told = json.loads(own.read_text(encoding="utf-8")) if own.exists() else dict(cell.config)
    return RunConfig.from_run_config(told)


def _measured_reference(reference: Reference, local: Mapping[str, Any]) -> Measured:
    assert reference.model_file is not None
    config = RunConfig.from_run_config({**reference.config, **local})
    return Measured(reference.seed, _load(reference.model_file), config)


def _examples(config: RunConfig) -> Tensor:
    x, _ = central_test_data(config)
    # Evenly spaced: test sets may be sorted by class.
    return x[torch.linspace(0, len(x) - 1, min(len(x), TEST_IMAGES)).long()]


def _batches(examples: Tensor) -> tuple[Tensor, ...]:
    return torch.split(examples, _BATCH)
