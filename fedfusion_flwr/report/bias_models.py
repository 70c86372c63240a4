# SPDX-License-Identifier: Apache-2.0
"""Measuring feature bias on models that were kept."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from fedfusion_flwr.computation import choose_device
from fedfusion_flwr.config import RunConfig
from fedfusion_flwr.data import central_test_data, data_for
from fedfusion_flwr.errors import FedFusionError
from fedfusion_flwr.fusion import NormalizationStatistics, StatisticsError
from fedfusion_flwr.models import model_for
from fedfusion_flwr.models.resize import fit_to_state
from fedfusion_flwr.report.bias_rows import Bias, RunningValues
from fedfusion_flwr.report.evidence import Cell, Reference
from fedfusion_flwr.report.feature_bias import (
    feature_distance,
    histogram_divergence,
    layer_features,
    running_values,
    statistics_gap,
)
from fedfusion_flwr.report.pictures import CENTRALIZED

MODEL = "final_model.safetensors"
TEST_IMAGES = 1000
"""Examples of the test set, evenly spaced, on which features are measured."""
_BATCH = 250


@dataclass(frozen=True, eq=False)
class Measured:
    """One trained model and what its features are like on a setting's test examples."""

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
        """The model, its weights loaded; on a GPU where there is one."""
        model = model_for(self.config, data_for(self.config))
        model = fit_to_state(model, self.state)
        model.load_state_dict(self.state)
        return model.eval().to(choose_device("auto"))

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

    @property
    def drawn(self) -> RunningValues | None:
        """What is drawn of the running values."""
        return None if self.values is None else RunningValues.of(*self.values)


class Bench:
    """The test examples of a setting, and the centralized models that have seen them.

    Both are loaded when first asked for.

    Parameters
    ----------
    file : Path
        The model of one of the setting's runs: beside it lies where its data are.
    cell : Cell
        That run.
    """

    def __init__(self, file: Path, cell: Cell) -> None:
        self._config = _run_config(file, cell)
        self._seen: dict[Path, tuple[Measured, list[Tensor]]] = {}

    def run(self, cell: Cell, references: Sequence[Reference]) -> tuple[Bias, RunningValues | None]:
        """Measure the kept model of a run: means over the references, which are kept too.

        Raises
        ------
        FedFusionError
            If data or a model cannot be loaded.
        """
        file = model_file(cell)
        assert file is not None
        model = Measured(_load(file), _run_config(file, cell))
        own = model.features(self._examples)
        seen = [self._reference(reference) for reference in references]
        distances = np.mean([_distances(own, features) for _, features in seen], axis=0)
        pairs = [p for other, _ in seen if (p := _divergences(model, other)) is not None]
        both = np.mean(pairs, axis=0).tolist() if pairs else None
        gap = model.gap(self._examples)
        bias = Bias(
            cell.strategy,
            [] if both is None else [both[0]],
            [] if both is None else [both[1]],
            [distances.tolist()],
            [] if gap is None else [gap],
        )
        return bias, model.drawn

    def floor(self, references: Sequence[Reference]) -> tuple[Bias, RunningValues | None]:
        """How far kept centralized models of one seed are from each other; values of the first.

        Raises
        ------
        FedFusionError
            If data or a model cannot be loaded.
        """
        seen = [self._reference(reference) for reference in references]
        pairs = list(itertools.combinations(seen, 2))
        both = [p for (x, _), (y, _) in pairs if (p := _divergences(x, y)) is not None]
        gaps = [gap for model, _ in seen if (gap := model.gap(self._examples)) is not None]
        bias = Bias(
            CENTRALIZED,
            [value for pair in both for value in pair],
            [value for pair in both for value in reversed(pair)],
            [_distances(x, y) for (_, x), (_, y) in pairs],
            gaps,
        )
        return bias, seen[0][0].drawn

    @cached_property
    def _examples(self) -> Tensor:
        x, _ = central_test_data(self._config)
        # Evenly spaced: test sets may be sorted by class.
        chosen = x[torch.linspace(0, len(x) - 1, min(len(x), TEST_IMAGES)).long()]
        return chosen.to(choose_device("auto"))

    def _reference(self, reference: Reference) -> tuple[Measured, list[Tensor]]:
        file = reference.model_file
        assert file is not None
        if file not in self._seen:
            config = {**reference.config, "data-root": self._config.data_root}
            model = Measured(_load(file), RunConfig.from_run_config(config))
            self._seen[file] = model, model.features(self._examples)
        return self._seen[file]


def model_file(cell: Cell) -> Path | None:
    """The served model of a run, where it was kept."""
    file = None if cell.directory is None else cell.directory / MODEL
    return file if file is not None and file.exists() else None


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


def _batches(examples: Tensor) -> tuple[Tensor, ...]:
    return torch.split(examples, _BATCH)
