# SPDX-License-Identifier: Apache-2.0
"""Every strategy is built from a run config, with its keys and only those."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

import pytest

from fedfusion_flwr.config import ConfigError, RunConfig
from fedfusion_flwr.errors import FedFusionError
from fedfusion_flwr.federation.strategy import FederatedStrategy
from fedfusion_flwr.randomness import derived_seed
from fedfusion_flwr.strategies import build_strategy, keys_of, registry, strategy_class
from tests.strategies.fedma.matched import NETWORK
from tests.support import untrained_state

# Another value than the default, for every key that not all strategies read.
CHANGED: dict[str, Any] = {
    "server_learning_rate": 0.5,
    "server_momentum": 0.25,
    "average_decay": 0.25,
    "max_client_weight": 0.5,
    "num_components": 3,
    "mixture": "inferred",
    "balance_exponent": 0.25,
    "sampling": "random",
    "absent": "remember",
    "component_coupling": 0.25,
    "coupled_rounds": 2,
    "assignment_smoothing": 0.25,
    "vae_step": 2,
    "vae_steps": 7,
    "vae_refit_steps": 3,
    "vae_learning_rate": 0.5,
    "proximal_mu": 0.5,
    "num_clusters": 3,
    "centre_update": "round",
    "warm_start": False,
    "warmup_rounds": 1,
    "cluster_round": 2,
    "distance_threshold": 1.5,
    "linkage": "average",
    "reshuffle_cycle": False,
    "pretrain_steps": 7,
    "pretrain_clients": 4,
    "inter_group_rate": 0.5,
    "matching_width": "fixed",
    "matching_gamma": 2.0,
    "matching_sweeps": 2,
}


def built(name: str, **settings: Any) -> FederatedStrategy:
    values = {"strategy": name, **settings}
    config = RunConfig.from_run_config({k.replace("_", "-"): v for k, v in values.items()})
    return build_strategy(config, [], untrained_state, lambda: NETWORK)


@pytest.mark.parametrize("name", registry())
def test_builds_with_its_keys(name: str) -> None:
    """What the user sets is what the strategy holds."""
    cls = registry()[name]
    settings = {key: CHANGED[key] for key in keys_of(cls)}
    shared = {"seed": 5, "fraction_train": 0.5, "evaluate_every": 4}
    strategy = built(name, **shared, **settings)
    assert type(strategy) is cls
    for key, value in {**settings, **shared, "min_available_nodes": 10}.items():
        assert getattr(strategy, key) == value, key
    assert getattr(strategy, "initial_state", untrained_state) is untrained_state
    assert getattr(strategy, "network", NETWORK) is NETWORK
    step, average = strategy.progress.step, strategy.progress.average
    assert step.learning_rate == strategy.server_learning_rate
    assert step.momentum == strategy.server_momentum
    assert average.decay == strategy.average_decay


@pytest.mark.parametrize("name", registry())
def test_every_argument_is_shown_and_every_one_of_its_own_is_a_key(name: str) -> None:
    """A user's editor completes them, and a run config can set them, with one default."""
    cls = registry()[name]
    parameters = inspect.signature(cls).parameters
    assert {p.kind for p in parameters.values()} == {inspect.Parameter.KEYWORD_ONLY}
    assert {"fraction_train", "min_valid_replies", "seed", "callbacks"} <= parameters.keys()
    assert all(p.annotation is not inspect.Parameter.empty for p in parameters.values())
    own = {f.name for f in dataclasses.fields(cls)} - FederatedStrategy.__dataclass_fields__.keys()
    assert own <= {*keys_of(cls), "inference", "initial_state", "network"}
    keys = RunConfig.__dataclass_fields__
    assert {*keys_of(cls)} <= keys.keys()
    for key in own & keys.keys():
        assert cls.__dataclass_fields__[key].default == keys[key].default, key


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("fedfusion", {"mixture": "uniform"}, "mixture = 'uniform' .*'inferred', 'balanced', 'counts'"),
    ("fedfusion", {"sampling": "strat"}, "sampling = 'strat' .*'random', 'stratified'"),
    ("fedfusion", {"balance_exponent": 3.0}, "balance_exponent = 3.0 .*from 0 to 1"),
    ("fedfusion", {"vae_step": 0}, "vae_step = 0 .*at least 1"),
    ("fedfusion", {"num_components": "8"}, "num_components = '8' .*at least 1"),
    ("fedfusion", {"fraction_train": 1.5}, "fraction_train = 1.5 .*from 0 to 1"),
    ("fedavg", {"min_valid_replies": -1}, "min_valid_replies = -1 .*at least 0"),
    ("fedavg", {"average_decay": 1.0}, "average_decay = 1.0 .*less than 1"),
    ("fedprox", {"proximal_mu": -0.1}, "proximal_mu = -0.1 .*at least 0"),
    ("ifca", {"server_momentum": 0.5}, "leave out server_learning_rate, server_momentum"),
]


@pytest.mark.parametrize(("name", "arguments", "sentence"), REFUSED)
def test_wrong_arguments_are_refused_in_one_sentence(
    name: str, arguments: dict[str, Any], sentence: str
) -> None:
    cls = registry()[name]
    with pytest.raises(ValueError, match=f"^{cls.__name__}.*{sentence}") as refusal:
        cls(**arguments)
    assert isinstance(refusal.value, FedFusionError)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("fedavgg", r"'fedavgg' is not allowed: did you mean 'fedavg'\? one of .*'ifca'"),
        ("json:loads", "is not a subclass of fedfusion_flwr.FederatedStrategy"),
        ("no_such_module:Class", "there is no module 'no_such_module'"),
    ],
)
def test_unknown_strategies_are_refused(name: str, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        strategy_class(name)


@pytest.mark.parametrize("name", registry())
def test_keys_that_do_nothing_are_named(name: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("WARNING", logger="flwr")
    read = set(keys_of(registry()[name]))
    built(name, **CHANGED)
    assert {*caplog.messages} == {
        f"run-config key '{key.replace('_', '-')}' has no effect with strategy '{name}'"
        for key in CHANGED.keys() - read
    }
    caplog.clear()
    built(name, **{key: CHANGED[key] for key in read})
    assert not caplog.records


def test_the_inference_gets_its_settings() -> None:
    strategy = built("fedfusion", vae_steps=7, vae_refit_steps=3, vae_learning_rate=0.5, seed=3)
    inference = strategy.state.inference
    assert (inference.steps, inference.refit_steps, inference.learning_rate) == (7, 3, 0.5)
    assert inference.seed == derived_seed(3, "inference")


@pytest.mark.parametrize("name", registry())
def test_settings_are_logged_at_the_start(name: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="flwr")
    built(name).summary()
    assert "Valid replies: at least 1, give up after 3 failed rounds" in caplog.text
    own = {
        "fedfusion": "Fusion: 8 components, mixture balanced (exponent 0.5), sampling stratified",
        "fedavgm": "Server step: learning rate 1, momentum 0.5",
        "fedprox": "FedProx: mu 0.01",
        "fedbn": "FedBN: each client's own BatchNorm layers",
        "fesem": "FeSEM: 5 centres, warm start on, centres are means of all their clients",
        "ifca": "IFCA: 5 models, 3 rounds of warm-up",
        "fedcluster": "FedCluster: after round 5, ward linkage, cut at 5 clusters",
        "fedcluster-cycling": "FedCluster by cycling: 5 clusters in turn, a new order",
        "fedgroup": "FedGroup: 5 groups, cold start of 50 steps, inter-group rate 0",
    }
    assert own.get(name, "Served model: average decay") in caplog.text


@pytest.mark.parametrize("name", registry())
def test_published_forms_have_no_server_momentum_unless_it_is_set(name: str) -> None:
    """By default only FedFusion and its control FedAvgM step with momentum and serve an average."""
    progress = built(name).progress
    stepped = name in ("fedfusion", "fedavgm")
    assert (progress.step.momentum, progress.average.decay) == ((0.5, 0.8) if stepped else (0, 0))
    assert progress.step.is_identity is not stepped
    cls = registry()[name]
    assert ("average_decay" in keys_of(cls)) is cls.single_model
    if cls.single_model:
        progress = built(name, server_momentum=0.5, average_decay=0.8).progress
        assert (progress.step.momentum, progress.average.decay) == (0.5, 0.8)
        progress = built(name, server_momentum=0.0, average_decay=0.0).progress
        assert (progress.step.momentum, progress.average.decay) == (0, 0)
