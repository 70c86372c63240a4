# SPDX-License-Identifier: Apache-2.0
"""Feature bias in rows: what a job keeps of its measures, and what the report reads of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file

from fedfusion_flwr.experiments.bias import MOST_VALUES, measure_bias, thinned
from fedfusion_flwr.experiments.figures.feature_bias import bias_section, layers_picture, read_bias
from fedfusion_flwr.experiments.results import CENTRALIZED, read_results
from tests.experiments.folders import (
    REAL_STRATEGIES,
    Row,
    cell,
    copied,
    lines,
    metrics,
    read_csv,
    reference,
    write_lines,
    write_suite,
)

SETTING = "fashion-mnist, lenet, components"


# --- what a job writes ----------------------------------------------------------------------------


def test_many_values_are_kept_as_quantiles() -> None:
    values = np.random.default_rng(0).normal(size=4800)
    kept = thinned(values)
    assert len(kept) == MOST_VALUES
    assert kept == sorted(kept)
    shares = np.linspace(0, 1, MOST_VALUES)
    np.testing.assert_allclose(kept, np.quantile(values, shares), rtol=1e-3)
    few = thinned(values[:MOST_VALUES])
    np.testing.assert_allclose(few, np.sort(values[:MOST_VALUES]), rtol=1e-3)
    assert thinned(np.array([np.inf, 0.0])) == [0, None]


def test_rows_hold_what_their_jobs_measured(real_suite: Path) -> None:
    digests = {
        seed: [r["digest"] for r in lines(real_suite / "centralized.jsonl") if r["seed"] == seed]
        for seed in (0, 1)
    }
    for row in lines(real_suite / "cells.jsonl"):
        bias, carries = row["bias"], row["strategy"] != "fed-gn"
        assert bias["references"] == digests[row["seed"]]
        assert [len(layers) for layers in bias["feature-distances"]] == [2, 2]
        assert len(bias["divergence"]) == len(bias["divergence-reversed"]) == 2 * carries
        assert (bias["statistics-gap"] is not None) == ("share-outside" in bias) == carries
        # Pictures show the first seed.
        drawn = carries and row["seed"] == 0
        assert len(bias.get("running-means", [])) == len(bias.get("running-deviations", []))
        assert len(bias.get("running-means", [])) == 48 * drawn
        assert len(json.dumps(bias)) < 2_000
    for row in lines(real_suite / "centralized.jsonl"):
        # Each is compared with those that saw the batches in an earlier order.
        assert row["bias"]["references"] == digests[row["seed"]][: row["batch_seed"]]
        assert row["bias"]["channels"] == len(row["bias"]["running-means"]) == 48


def test_a_model_is_no_distance_from_itself(real_suite: Path) -> None:
    row = lines(real_suite / "centralized.jsonl")[0]
    images = real_suite.parent / "stripes.npz"
    file = real_suite / row["model_file"]
    one = {"config": row["config"], "model_file": str(file), "digest": row["digest"]}
    config = {**row["config"], "data-root": str(images)}
    bias = measure_bias(config, load_file(file), [one], drawn=False)
    assert (bias["divergence"], bias["divergence-reversed"]) == ([0], [0])
    assert bias["feature-distances"] == [[pytest.approx(0, abs=1e-9)] * 2]
    assert bias["statistics-gap"] == row["bias"]["statistics-gap"] > 0
    assert "running-means" not in bias


def test_what_cannot_be_measured_is_a_sentence(real_suite: Path, tmp_path: Path) -> None:
    row = lines(real_suite / "centralized.jsonl")[0]
    state = load_file(real_suite / row["model_file"])
    broken = tmp_path / "0-1.safetensors"
    broken.write_bytes(b"half a model")
    one = {"config": row["config"], "model_file": str(broken), "digest": row["digest"]}
    here = {**row["config"], "data-root": str(real_suite.parent / "stripes.npz")}
    assert "0-1.safetensors' is damaged" in measure_bias(here, state, [one], False)["missing"]
    gone = {**row["config"], "data-root": str(tmp_path / "gone.npz")}
    bias = measure_bias(gone, state, [one], drawn=False)
    assert "gone.npz" in bias["missing"]
    # Also what nobody thought of: a finished run is not lost for it.
    other = measure_bias(here, {"a": state[next(iter(state))]}, [one], drawn=False)
    assert "Error: " in other["missing"]
    folder = copied(real_suite, tmp_path / "results")
    rows = lines(folder / "cells.jsonl")
    write_lines(folder / "cells.jsonl", [r | {"bias": bias} for r in rows])
    section = bias_section(read_results(folder))
    assert section.parts == []
    assert section.missing == [f"{SETTING}: {bias['missing']}."]


# --- what the report shows ------------------------------------------------------------------------


def test_measures_of_the_suite(real_suite: Path) -> None:
    rows = read_csv(real_suite, "bias-fashion-mnist")

    def values(measure: str, strategy: str) -> list[float]:
        wanted = (measure, strategy)
        return [float(r["value"]) for r in rows if (r["measure"], r["strategy"]) == wanted]

    # Two pairs of centralized models, each compared both ways; four models by themselves.
    assert len(values("divergence", CENTRALIZED)) == 4
    assert len(values("statistics-gap", CENTRALIZED)) == 4
    assert len(values("feature-distance", CENTRALIZED)) == 2
    for strategy in REAL_STRATEGIES:
        batchnorm = strategy != "fed-gn"
        assert len(values("divergence", strategy)) == 2 * batchnorm
        assert len(values("statistics-gap", strategy)) == 2 * batchnorm
        assert all(0 < value < 1 for value in values("feature-distance", strategy))
    assert values("divergence-published", "fedavg") == [0.13]
    forward, backward = values("divergence", "fedavg"), values("divergence-reversed", "fedavg")
    assert forward != backward
    assert min(forward + backward) > 0


def bias(distances: list[list[float | None]], **changed: Any) -> Row:
    """A row's bias without running statistics; keys with underscores."""
    more = {key.replace("_", "-"): value for key, value in changed.items()}
    row = {"references": ["x"], "divergence": [], "divergence-reversed": []}
    return {**row, "feature-distances": distances, "statistics-gap": None, **more}


def suite_of(folder: Path, runs: dict[str, list[Row]], *floor: Row) -> Path:
    """A suite of these runs, and of a reference x with others that were compared with it."""
    cells = [
        {**cell(strategy, seed, metrics([0.1, 0.5])), "bias": row}
        for strategy, rows in runs.items()
        for seed, row in enumerate(rows)
    ]
    references = [
        {**reference(0, order, [0.9]), "digest": "xyz"[order], "bias": row}
        for order, row in enumerate([bias([], references=[]), *floor])
    ]
    return write_suite(folder, cells, references)


def test_means_over_references_layers_and_runs_by_hand(tmp_path: Path) -> None:
    two = bias(
        [[0.25, None], [0.75, None]],
        divergence=[1.0, 2.0],
        divergence_reversed=[3.0, 5.0],
        statistics_gap=0.125,
    )
    floor = bias([[0.0, 0.25]], divergence=[0.5], divergence_reversed=[0.25])
    folder = suite_of(tmp_path, {"fedfusion": [two]}, floor)
    results = read_results(folder)
    ((setting, runs),) = results.compared.items()
    found, complaints = read_bias(results, setting, runs)
    assert complaints == []
    assert found.of("divergence", "fedfusion") == [1.5]
    assert found.of("divergence-reversed", "fedfusion") == [4.0]
    # A layer that tells no examples apart has no distance.
    assert found.of("feature-distance", "fedfusion") == [0.5]
    assert found.of("statistics-gap", "fedfusion") == [0.125]
    assert found.of("divergence", CENTRALIZED) == [0.5, 0.25]
    assert found.of("divergence-reversed", CENTRALIZED) == [0.25, 0.5]
    assert found.of("feature-distance", CENTRALIZED) == [0.125]


def test_layer_by_layer(tmp_path: Path) -> None:
    runs = {
        "fedfusion": [bias([[0.25, 0.5, 0.75]]), bias([[0.5, 0.5, 0.25]])],
        "without normalization": [bias([[]]), bias([[]])],
    }
    folder = suite_of(tmp_path, runs, bias([[0.0, 0.125, 0.25]]))
    results = read_results(folder)
    ((setting, of),) = results.compared.items()
    picture = layers_picture(read_bias(results, setting, of)[0])
    # Of seed 0 only, which has a reference.
    assert picture.numbers.to_dict("records") == [
        {"strategy": strategy, "layer": layer, "feature-distance": distance}
        for strategy, distances in (
            (CENTRALIZED, (0.0, 0.125, 0.25)),
            ("fedfusion", (0.25, 0.5, 0.75)),
        )
        for layer, distance in enumerate(distances, 1)
    ]
    picture.write(tmp_path)
    (file,) = tmp_path.glob("bias-layers-*.svg")
    assert "centralized (floor)" in file.read_text()


def test_runs_that_were_measured_on_other_references_are_named(tmp_path: Path) -> None:
    other = bias([[0.5]], references=["made anew"])
    folder = suite_of(tmp_path, {"fedavg": [bias([[0.5]])], "fedfusion": [other]})
    section = bias_section(read_results(folder))
    (sentence,) = section.missing
    assert "1 runs were measured on other centralized models than those of this folder" in sentence
    assert "fedfusion" in sentence
    strategies = section.parts[0].pictures[0].numbers["strategy"]
    assert set(strategies) == {"fedavg"}


def test_a_damaged_bias_is_named_and_ignored(tmp_path: Path) -> None:
    damaged: list[Any] = [
        {},
        {"feature-distances": 3},
        bias([["a"]]),
        bias([[0.5]], divergence=[1]),
    ]  # type: ignore[list-item]
    for row in damaged:
        folder = suite_of(tmp_path, {"fedavg": [bias([[0.5]])], "fedfusion": [row]})
        section = bias_section(read_results(folder))
        (sentence,) = section.missing
        assert "the feature bias of main-fedfusion-components--0 is damaged" in sentence
        assert set(section.parts[0].pictures[0].numbers["strategy"]) == {"fedavg"}
