# SPDX-License-Identifier: Apache-2.0
"""Every key of the run config: its default, its documentation and its refusals."""

from __future__ import annotations

import dataclasses
import re
import tomllib
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedfusion_flwr.config import (
    DATASETS,
    MODELS,
    ConfigError,
    RunConfig,
    Value,
    cohort_size,
)
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


OUT_OF_RANGE: list[tuple[str, Value, str]] = [
    ("num-server-rounds", 0, "at least 1"),
    ("seed", -1, "at least 0"),
    ("strategy", "", "a name, or your own"),
    ("checkpoint-every", -1, "at least 0"),
    ("best-metric", "train-loss", "'global-accuracy', 'global-loss'"),
    ("patience", -1, "at least 0"),
    ("dataset", "imagenet", "'mnist-5k'"),
    ("dataset", "my data:load", "'module:function'"),
    ("vocabulary-size", 2, "at least 3"),
    ("text-length", 0, "at least 1"),
    ("train-examples", -1, "at least 0"),
    ("test-examples", -1, "at least 0"),
    ("num-clients", 0, "at least 1"),
    ("partition", "random", "'iid'"),
    ("dirichlet-alpha", 0.0, "greater than 0"),
    ("dirichlet-alpha", -0.5, "greater than 0"),
    ("min-partition-size", 1, "at least 2"),
    ("classes-per-client", 0, "at least 1"),
    ("shards-per-client", 0, "at least 1"),
    ("planted-components", 0, "at least 1"),
    ("component-mixing", -0.1, "at least 0"),
    ("component-sizes", "", "'balanced', 'long-tailed'"),
    ("component-transform", "flip", "'none', 'rotate'"),
    ("validation-fraction", 1.0, "less than 1"),
    ("validation-fraction", -0.1, "at least 0"),
    ("model", "LeNet", "'lenet'"),
    ("model", "nets:", "'module:function'"),
    ("normalization", "instance", "'batch', 'group', 'layer', 'none'"),
    ("normalization-groups", 0, "at least 1"),
    ("precision", "fp16", "'fp32', 'bf16'"),
    ("local-epochs", 0, "at least 1"),
    ("batch-size", 1, "at least 2"),
    ("learning-rate", 0.0, "greater than 0"),
    ("momentum", 1.0, "less than 1"),
    ("momentum", -0.9, "at least 0"),
    ("weight-decay", -1e-4, "at least 0"),
    ("local-normalization", "group", "'batch', 'fused'"),
    ("fused-from-round", 1, "at least 2"),
    ("device", "gpu", "'auto', 'cpu', 'cuda'"),
    ("threads-per-client", 0, "at least 1"),
    ("fraction-train", 0.0, "greater than 0"),
    ("fraction-train", 1.01, "at most 1"),
    ("fraction-evaluate", -0.1, "from 0 to 1"),
    ("fraction-evaluate", 1.1, "from 0 to 1"),
    ("evaluate-every", 0, "at least 1"),
    ("central-evaluate-every", 0, "at least 1"),
    ("sampling", "uniform", "'random', 'stratified'"),
    ("num-components", 0, "at least 1"),
    ("mixture", "even", "'inferred', 'balanced', 'counts'"),
    ("balance-exponent", 1.5, "from 0 to 1"),
    ("statistics-source", "server", "'local', 'probe'"),
    ("statistics-layers", "first", "'all', 'ends'"),
    ("statistics-noise", -0.1, "from 0 to 10"),
    ("assignment-smoothing", 1.0, "less than 1"),
    ("absent", "keep", "'drop', 'remember'"),
    ("vae-step", 0, "at least 1"),
    ("vae-steps", 0, "at least 1"),
    ("vae-refit-steps", 0, "at least 1"),
    ("vae-learning-rate", 0.0, "greater than 0"),
    ("proximal-mu", -0.1, "at least 0"),
    ("num-clusters", 0, "at least 1"),
    ("cluster-round", 0, "at least 1"),
    ("distance-threshold", -1.0, "at least 0"),
    ("linkage", "single", "'ward', 'complete', 'average'"),
    ("centre-update", "none", "'all', 'round'"),
    ("warmup-rounds", -1, "at least 0"),
    ("pretrain-steps", 0, "at least 1"),
    ("pretrain-clients", 0, "at least 1"),
    ("inter-group-rate", -1.0, "at least 0"),
    ("matching-width", "wide", "'variable', 'fixed'"),
    ("matching-gamma", 0.0, "greater than 0"),
    ("matching-sweeps", 0, "at least 1"),
    ("server-learning-rate", -1.0, "greater than 0"),
    ("server-momentum", 1.0, "less than 1"),
    ("average-decay", 1.0, "less than 1"),
    ("max-client-weight", 0.0, "greater than 0"),
    ("max-client-weight", 2.0, "at most 1"),
    ("min-valid-replies", 0, "at least 1"),
    ("max-failed-rounds", 0, "at least 1"),
    ("max-examples", 0, "at least 1"),
    ("max-update-ratio", 0.0, "greater than 0"),
    ("defence", "krum", "'none', 'robust'"),
    ("outlier-threshold", -1.0, "at least 0"),
    ("clip-quantile", 0.0, "greater than 0"),
    ("max-examples-ratio", 0.5, "0, or at least 1"),
    ("round-timeout", 0.0, "greater than 0"),
    ("node-timeout", -1.0, "greater than 0"),
    ("min-available-clients", -1, "at least 0"),
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
def test_whole_numbers_do_for_numbers(key: str) -> None:
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


def test_unknown_key_like_no_other() -> None:
    assert "[tool.flwr.app.config]" in refusal("zzz", 1)


def test_more_planted_components_than_clients() -> None:
    with pytest.raises(ConfigError, match=r"^planted-components = 5 .* num-clients, which is 4$"):
        parse(num_clients=4)
    assert parse(num_clients=4, partition="iid").num_clients == 4
    assert parse(num_clients=5).num_clients == 5


def test_evaluation_without_held_out_examples() -> None:
    with pytest.raises(ConfigError, match=r"^validation-fraction = 0.0 .* fraction-evaluate = 0.0"):
        parse(validation_fraction=0.0)
    assert parse(validation_fraction=0.0, fraction_evaluate=0.0).fraction_evaluate == 0


def test_models_that_change_their_shapes_are_not_compiled() -> None:
    with pytest.raises(ConfigError, match=r"^compile = True does not go with .* compile = False"):
        parse(strategy="fedma", compile=True)
    assert parse(strategy="fedavg", compile=True).compile


def test_fed_gn_is_fedavg_with_group_norm() -> None:
    assert parse(strategy="fed-gn").model_normalization == "group"
    assert parse(strategy="fed-gn", normalization="layer").model_normalization == "layer"
    assert parse(strategy="fedavg").model_normalization == "batch"


def test_more_first_clients_than_clients() -> None:
    with pytest.raises(ConfigError) as caught:
        parse(min_available_clients=11)
    text = str(caught.value)
    assert "min-available-clients = 11 can never be met" in text
    assert "num-clients, which is 10" in text
    assert parse(min_available_clients=10).num_first_clients == 10
    assert parse(min_available_clients=2).num_first_clients == 2
    assert parse().num_first_clients == 10


def test_min_valid_replies_that_can_never_come() -> None:
    with pytest.raises(ConfigError) as caught:
        parse(min_valid_replies=4, fraction_train=0.3)
    text = str(caught.value)
    assert "min-valid-replies = 4 can never be met" in text
    assert "at most 3 is allowed" in text
    assert parse(min_valid_replies=3, fraction_train=0.3).num_train_clients == 3


def test_fraction_that_trains_nobody() -> None:
    with pytest.raises(ConfigError) as caught:
        parse(fraction_train=0.05)
    assert "fraction-train = 0.05" in str(caught.value)
    assert "at least 0.1" in str(caught.value)
    assert parse(fraction_train=0.1).num_train_clients == 1


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
