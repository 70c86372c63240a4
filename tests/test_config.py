# SPDX-License-Identifier: Apache-2.0
"""Every key of the run config: its default, its documentation and its refusals."""

from __future__ import annotations

import dataclasses
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedfusion_flwr.config import DATASETS, MODELS, ConfigError, RunConfig, Value, cohort_size
from fedfusion_flwr.errors import FedFusionError

PYPROJECT = Path(__file__).parents[1] / "pyproject.toml"
KEYS = [f.name.replace("_", "-") for f in dataclasses.fields(RunConfig)]
TYPES = {f.name.replace("_", "-"): type(f.default).__name__ for f in dataclasses.fields(RunConfig)}
NUMBERS = [key for key, kind in TYPES.items() if kind in ("int", "float")]


def parse(**keys: Value) -> RunConfig:
    return RunConfig.from_run_config({k.replace("_", "-"): v for k, v in keys.items()})


def refusal(key: str, value: Value) -> str:
    with pytest.raises(ConfigError) as caught:
        RunConfig.from_run_config({key: value})
    assert isinstance(caught.value, FedFusionError)
    text = str(caught.value)
    assert "\n" not in text
    return text


def test_pyproject_holds_the_defaults() -> None:
    config = tomllib.loads(PYPROJECT.read_text())["tool"]["flwr"]["app"]["config"]
    assert list(config) == KEYS
    for key, value in RunConfig().to_run_config().items():
        assert config[key] == value, key
        assert type(config[key]) is type(value), key
    assert RunConfig.from_run_config(config) == RunConfig()


def test_every_key_in_pyproject_has_a_comment() -> None:
    section = PYPROJECT.read_text().split("[tool.flwr.app.config]\n")[1].split("\n[")[0]
    lines = [line for line in section.splitlines() if line.strip() and not line.startswith("#")]
    assert len(lines) == len(KEYS)
    for line in lines:
        assert re.fullmatch(r'[a-z-]+ = ("[^"]*"|[\w.-]+) +# \S.*', line), line


def test_defaults_are_allowed_and_frozen() -> None:
    config = RunConfig.from_run_config({})
    assert config == RunConfig()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.seed = 1  # type: ignore[misc]


WORDS: list[tuple[str, Value, str]] = [
    ("strategy", "", "a name, or your own"),
    ("best-metric", "train-loss", "'global-accuracy', 'global-loss'"),
    ("dataset", "imagenet", "'mnist-5k'"),
    ("dataset", "my data:load", "'module:function'"),
    ("partition", "random", "'iid'"),
    ("component-sizes", "", "'balanced', 'long-tailed'"),
    ("component-transform", "flip", "'none', 'rotate'"),
    ("model", "LeNet", "'lenet'"),
    ("model", "nets:", "'module:function'"),
    ("normalization", "instance", "'batch', 'group', 'layer', 'none'"),
    ("precision", "fp16", "'fp32', 'bf16'"),
    ("local-normalization", "group", "'batch', 'fused'"),
    ("evaluation-normalization", "mine", "'received', 'own'"),
    ("device", "gpu", "'auto', 'cpu', 'cuda'"),
    ("sampling", "uniform", "'random', 'stratified'"),
    ("mixture", "even", "'inferred', 'balanced', 'counts'"),
    ("statistics-source", "server", "'local', 'probe'"),
    ("statistics-layers", "first", "'all', 'ends'"),
    ("absent", "keep", "'drop', 'remember'"),
    ("linkage", "single", "'ward', 'complete', 'average'"),
    ("centre-update", "none", "'all', 'round'"),
    ("matching-width", "wide", "'variable', 'fixed'"),
    ("defence", "krum", "'none', 'robust'"),
]
FIGURES: list[tuple[Value, str, str]] = [
    (-1, "at least 0", "seed checkpoint-every patience train-examples test-examples warmup-rounds"),
    (-1, "at least 0", "min-available-clients local-steps finetune-steps coupled-rounds"),
    (0, "at least 1", "num-server-rounds text-length num-clients classes-per-client vae-step"),
    (0, "at least 1", "shards-per-client planted-components normalization-groups local-epochs"),
    (0, "at least 1", "threads-per-client evaluate-every central-evaluate-every num-components"),
    (0, "at least 1", "vae-steps vae-refit-steps num-clusters cluster-round pretrain-steps"),
    (0, "at least 1", "pretrain-clients matching-sweeps min-valid-replies max-failed-rounds"),
    (0, "at least 1", "max-examples"),
    (1, "at least 2", "min-partition-size batch-size fused-from-round"),
    (2, "at least 3", "vocabulary-size"),
    (-0.1, "at least 0", "component-mixing validation-fraction momentum weight-decay proximal-mu"),
    (-1.0, "at least 0", "distance-threshold inter-group-rate outlier-threshold"),
    (1.0, "less than 1", "validation-fraction momentum assignment-smoothing server-momentum"),
    (1.0, "less than 1", "average-decay"),
    (0.0, "greater than 0", "dirichlet-alpha learning-rate fraction-train vae-learning-rate"),
    (0.0, "greater than 0", "matching-gamma max-client-weight max-update-ratio clip-quantile"),
    (0.0, "greater than 0", "round-timeout"),
    (-0.5, "greater than 0", "dirichlet-alpha server-learning-rate node-timeout"),
    (1.01, "at most 1", "fraction-train max-client-weight"),
    (-0.1, "from 0 to 1", "fraction-evaluate"),
    (1.1, "from 0 to 1", "fraction-evaluate balance-exponent component-coupling"),
    (-0.1, "from 0 to 10", "statistics-noise"),
    (0.5, "0, or at least 1", "max-examples-ratio"),
    (-0.5, "at least 0, or -1 for the strategy's own", "label-calibration"),
]
OUT_OF_RANGE = WORDS + [
    (key, value, allowed) for value, allowed, keys in FIGURES for key in keys.split()
]


@pytest.mark.parametrize(("key", "value", "allowed"), OUT_OF_RANGE)
def test_out_of_range(key: str, value: Value, allowed: str) -> None:
    text = refusal(key, value)
    assert text.startswith(f"{key} = {value!r} is not allowed: ")
    assert allowed in text


def test_every_limited_key_is_in_the_table() -> None:
    unlimited = {
        *("output-dir", "resume-from", "data-root", "pool-moments", "augment", "compile"),
        *("reshuffle-cycle", "warm-start", "tensorboard"),
    }
    assert {key for key, _, _ in OUT_OF_RANGE} == set(KEYS) - unlimited


@pytest.mark.parametrize("key", KEYS)
def test_wrong_types(key: str) -> None:
    wrong: dict[str, list[Value]] = {
        "int": [1.0, "1", True],
        "float": ["0.5", True, ""],
        "str": [1, 0.5, False],
        "bool": [1, 0, "true", 1.0],
    }
    words = {"int": "whole number", "float": "a number", "str": "a string", "bool": "true or false"}
    for value in wrong[TYPES[key]]:
        text = refusal(key, value)
        assert f"{key} = {value!r} is not allowed" in text
        assert words[TYPES[key]] in text


@pytest.mark.parametrize("key", [key for key in NUMBERS if TYPES[key] == "float"])
def test_numbers_that_are_not_finite(key: str) -> None:
    for value in (float("nan"), float("inf"), float("-inf")):
        text = refusal(key, value)
        assert key in text
        assert "finite" in text


@pytest.mark.parametrize("key", ["dirichlet-alpha", "learning-rate", "round-timeout"])
def test_whole_numbers_are_accepted_as_numbers(key: str) -> None:
    value = getattr(RunConfig.from_run_config({key: 2}), key.replace("-", "_"))
    assert value == 2.0
    assert type(value) is float


@pytest.mark.parametrize(
    ("key", "close"),
    [
        ("num-client", "num-clients"),
        ("learning_rate", "learning-rate"),
        ("num-rounds", "num-server-rounds"),
        ("balance-exponant", "balance-exponent"),
    ],
)
def test_unknown_key_suggests_the_close_one(key: str, close: str) -> None:
    text = refusal(key, 1)
    assert f"'{key}'" in text
    assert f"did you mean '{close}'?" in text
    assert "[tool.flwr.app.config]" in refusal("zzz", 1)


TOGETHER: list[tuple[dict[str, Any], str]] = [
    ({"num_clients": 4}, r"planted-components = 5 .* num-clients, which is 4$"),
    ({"validation_fraction": 0.0}, "validation-fraction = 0.0 .* fraction-evaluate = 0.0"),
    ({"strategy": "fedma", "compile": True}, "compile = True does not go with .* compile = False"),
    (
        {"min_available_clients": 11},
        "min-available-clients = 11 can never be met: .* num-clients, which is 10",
    ),
    (
        {"min_valid_replies": 4, "fraction_train": 0.3},
        "min-valid-replies = 4 can never be met: .* at most 3 is allowed",
    ),
    ({"fraction_train": 0.05}, "fraction-train = 0.05 .* at least 0.1"),
]


@pytest.mark.parametrize(("settings", "sentence"), TOGETHER)
def test_keys_that_do_not_go_together(settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=f"^{sentence}"):
        parse(**settings)


def test_keys_that_go_together() -> None:
    parse(num_clients=4, partition="iid")
    parse(num_clients=5)
    parse(validation_fraction=0.0, fraction_evaluate=0.0)
    parse(strategy="fedavg", compile=True)
    assert parse(min_valid_replies=3, fraction_train=0.3).num_train_clients == 3
    assert parse(fraction_train=0.1).num_train_clients == 1
    for wanted, needed in ((10, 10), (2, 2), (0, 10)):
        assert parse(min_available_clients=wanted).num_first_clients == needed


def test_fed_gn_is_fedavg_with_group_norm() -> None:
    assert parse(strategy="fed-gn").model_normalization == "group"
    assert parse(strategy="fed-gn", normalization="layer").model_normalization == "layer"
    assert parse(strategy="fedavg").model_normalization == "batch"


@pytest.mark.parametrize(
    ("population", "fraction", "size"),
    [(10, 0.3, 3), (10, 0.39, 3), (100, 0.29, 29), (10, 0.01, 1), (7, 1.0, 7), (60, 1 / 6, 10)],
)
def test_cohort_size(population: int, fraction: float, size: int) -> None:
    assert cohort_size(population, fraction) == size


configs = st.builds(
    RunConfig,
    num_server_rounds=st.integers(1, 10**6),
    seed=st.integers(0, 2**63 - 1),
    strategy=st.sampled_from(["fedfusion", "fedma", "my.strategies:Mine"]),
    dataset=st.sampled_from([*DATASETS, "my.data:load"]),
    model=st.sampled_from([*MODELS, "nets:build"]),
    output_dir=st.text(max_size=20),
    num_clients=st.integers(10, 1000),
    dirichlet_alpha=st.floats(1e-6, 1e6),
    learning_rate=st.floats(1e-300, 1e6),
    fraction_train=st.floats(0.1, 1.0),
    balance_exponent=st.floats(0, 1),
    pool_moments=st.booleans(),
    mixture=st.sampled_from(["inferred", "balanced", "counts"]),
)


@settings(max_examples=100, deadline=None)
@given(configs)
def test_round_trip(config: RunConfig) -> None:
    values = config.to_run_config()
    assert list(values) == KEYS
    assert RunConfig.from_run_config(values) == config
