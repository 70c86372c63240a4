# SPDX-License-Identifier: Apache-2.0
"""Feature bias, measured at the end of a job and kept in its row."""

from __future__ import annotations

import traceback
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from fedfusion_flwr.computation import choose_device
from fedfusion_flwr.config import RunConfig
from fedfusion_flwr.data import central_test_data, data_for
from fedfusion_flwr.errors import FedFusionError
from fedfusion_flwr.experiments import measures
from fedfusion_flwr.experiments.results import rounded
from fedfusion_flwr.experiments.rows import Row
from fedfusion_flwr.fusion import NormalizationStatistics, StatisticsError
from fedfusion_flwr.models import model_for
from fedfusion_flwr.models.resize import fit_to_state

TEST_IMAGES = 1000
"""Examples of the test set, evenly spaced, on which features are measured."""
MOST_VALUES = 201
"""Most values of one distribution that a row keeps: no picture shows more."""
_BATCH = 250
_DIGITS, _DIGITS_DRAWN = 6, 4


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
    model = _loaded(config, state)
    own, carries = measures.layer_features(model, batches).values(), _carries_statistics(state)
    row: Row = {
        "references": [reference["digest"] for reference in references],
        "divergence": [],
        "divergence-reversed": [],
        "feature-distances": [],
        "statistics-gap": None,
    }
    if carries:
        means, deviations = measures.running_values(state)
        carried = NormalizationStatistics.from_state_dict(state)
        gap = measures.statistics_gap(carried, NormalizationStatistics.probe(model, batches))
        row["statistics-gap"] = rounded(gap)
        row["channels"] = len(means)
        row["share-outside"] = rounded(measures.share_outside(np.concatenate([means, deviations])))
        if drawn:
            row["running-means"], row["running-deviations"] = thinned(means), thinned(deviations)
    for reference in references:
        other = _state_of(reference["model_file"])
        others = RunConfig.from_run_config({**reference["config"], "data-root": config.data_root})
        features = measures.layer_features(_loaded(others, other), batches).values()
        distances = [measures.feature_distance(a, b) for a, b in zip(own, features, strict=False)]
        row["feature-distances"].append([rounded(distance) for distance in distances])
        if carries and _carries_statistics(other):
            p, q = (np.concatenate(measures.running_values(of)) for of in (state, other))
            row["divergence"].append(rounded(measures.histogram_divergence(p, q)))
            row["divergence-reversed"].append(rounded(measures.histogram_divergence(q, p)))
    return row


def _loaded(config: RunConfig, state: Mapping[str, Tensor]) -> torch.nn.Module:
    """The model with these weights; on a GPU if there is one."""
    model = fit_to_state(model_for(config, data_for(config)), state)
    model.load_state_dict(state)
    return model.eval().to(choose_device("auto"))


def _carries_statistics(state: Mapping[str, Tensor]) -> bool:
    try:
        measures.running_values(state)
    except StatisticsError:
        return False
    return True


def _state_of(path: str) -> dict[str, Tensor]:
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
