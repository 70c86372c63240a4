# SPDX-License-Identifier: Apache-2.0
"""Every strategy builds from a run config, with its keys and only those."""

from __future__ import annotations

import inspect
import logging
from typing import Any

import pytest

from fedfusion_flwr.config import STRATEGIES, RunConfig
from fedfusion_flwr.strategies import (
    REGISTRY,
    BaseStrategy,
    FedClusterCycling,
    FedFusion,
    MultiModelStrategy,
    SingleModelStrategy,
    build_strategy,
)
from tests.strategies.fedma.matched import NETWORK
from tests.support import untrained_state

# A value of every particular key that is not its default.
CHANGED: dict[str, Any] = {
    "server_learning_rate": 0.5,
    "server_momentum": 0.25,
    "average_decay": 0.25,
    "max_client_weight": 0.5,
    "num_components": 3,
    "mixture": "inferred",
    "balance_exponent": 0.25,
    "sampling": "stratified",
    "absent": "remember",
    "assignment_smoothing": 0.25,
    "vae_step": 2,
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
}
HELD_ELSEWHERE = {
    "server_learning_rate": lambda s: s.step.learning_rate,
    "server_momentum": lambda s: s.step.momentum,
    "average_decay": lambda s: s.average.decay,
    "assignment_smoothing": lambda s: s.memory.smoothing,
    "mixture": lambda s: s.mixture_kind,
    "absent": lambda s: "remember" if s.absent is not None else "drop",
}


def built(name: str, **settings: Any) -> BaseStrategy:
    values = {"strategy": name, **settings}
    config = RunConfig.from_run_config({k.replace("_", "-"): v for k, v in values.items()})
    return build_strategy(config, [], untrained_state, NETWORK)


@pytest.mark.parametrize("name", REGISTRY)
def test_builds_with_its_keys(name: str) -> None:
    """What the user sets is what the strategy holds."""
    entry = REGISTRY[name]
    settings = {key: CHANGED[key] for key in entry.keys if key in CHANGED}
    strategy = built(name, seed=5, fraction_train=0.5, evaluate_every=4, **settings)
    assert type(strategy) is entry.strategy
    for key, value in settings.items():
        held = HELD_ELSEWHERE[key](strategy) if key in HELD_ELSEWHERE else getattr(strategy, key)
        assert held == value, key
    assert (strategy.seed, strategy.fraction_train, strategy.evaluate_every) == (5, 0.5, 4)
    assert strategy.min_available_nodes == 10
    if isinstance(strategy, MultiModelStrategy):
        assert strategy.initial_state is untrained_state


@pytest.mark.parametrize("name", REGISTRY)
def test_every_argument_of_its_own_is_a_key(name: str) -> None:
    """What a strategy's class adds to its bases' arguments can be set from a run config."""
    entry = REGISTRY[name]
    known = {*entry.keys, "inference", "initial_state", "network"}
    for part in entry.strategy.__mro__:
        if part in (SingleModelStrategy, MultiModelStrategy, BaseStrategy):
            break
        if "__init__" not in vars(part):
            continue
        parameters = inspect.signature(part.__init__).parameters.values()
        own = {p.name for p in parameters if p.kind is p.KEYWORD_ONLY}
        assert own <= known, own - known


def test_the_registry_names_strategies_that_the_config_knows() -> None:
    assert set(REGISTRY) <= set(STRATEGIES)
    particular = {key for entry in REGISTRY.values() for key in entry.keys}
    fields = set(RunConfig.__dataclass_fields__)
    assert particular <= fields


@pytest.mark.parametrize("name", REGISTRY)
def test_keys_that_do_nothing_are_told(name: str, caplog: pytest.LogCaptureFixture) -> None:
    logging.getLogger("flwr").propagate = True
    caplog.set_level(logging.WARNING)
    read = set(REGISTRY[name].keys)
    idle = {key: value for key, value in CHANGED.items() if key not in read}
    built(name, **CHANGED)
    told = {record.getMessage() for record in caplog.records}
    assert told == {
        f"run-config key '{key.replace('_', '-')}' has no effect with strategy '{name}'"
        for key in idle
        if any(key in entry.keys for entry in REGISTRY.values())
    }
    caplog.clear()
    built(name, **{key: value for key, value in CHANGED.items() if key in read})
    assert not caplog.records


def test_the_inferences_keys_belong_to_fedfusion(caplog: pytest.LogCaptureFixture) -> None:
    logging.getLogger("flwr").propagate = True
    built("fedavg", vae_steps=7)
    assert "'vae-steps' has no effect with strategy 'fedavg'" in caplog.text
    caplog.clear()
    strategy = built("fedfusion", vae_steps=7, vae_refit_steps=3, vae_learning_rate=0.5, seed=3)
    assert isinstance(strategy, FedFusion)
    assert not caplog.records
    inference = strategy.inference
    assert (inference.steps, inference.refit_steps, inference.learning_rate) == (7, 3, 0.5)
    assert inference.seed == 3


@pytest.mark.parametrize("name", REGISTRY)
def test_settings_are_logged_at_the_start(name: str, caplog: pytest.LogCaptureFixture) -> None:
    logging.getLogger("flwr").propagate = True
    caplog.set_level(logging.INFO)
    built(name).summary()
    assert "Valid replies: at least 1, give up after 3 failed rounds" in caplog.text
    own = {
        "fedfusion": "Fusion: 8 components, mixture balanced (exponent 0.5), sampling random",
        "fedavgm": "Server step: learning rate 1, momentum 0.5",
        "fedprox": "FedProx: mu 0.01",
        "fedbn": "FedBN: BatchNorm layers of each client's own",
        "fesem": "FeSEM: 5 centres, warm start on, centres are means of all their clients",
        "ifca": "IFCA: 5 models, 3 rounds of warm-up",
        "fedcluster": "FedCluster: after round 5, ward linkage, cut at 5 clusters",
        "fedcluster-cycling": "FedCluster by cycling: 5 clusters in turn, a new order",
        "fedgroup": "FedGroup: 5 groups, cold start of 50 steps, inter-group rate 0",
    }
    assert own.get(name, "Served model: average decay") in caplog.text


def test_published_forms_take_no_server_momentum() -> None:
    """Only FedFusion and its control FedAvgM step with momentum and serve an average."""
    with_step = {name for name, entry in REGISTRY.items() if "server_momentum" in entry.keys}
    assert with_step == {"fedfusion", "fedavgm"}
    cycled = built("fedcluster-cycling")
    assert isinstance(cycled, FedClusterCycling)
    assert cycled.step.is_identity
    assert cycled.average.decay == 0
