# SPDX-License-Identifier: Apache-2.0
"""The attackers of the benchmark do what they say, and the preset holds some of them off."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from flwr.app import Context, Message

from benchmarks import attackers
from benchmarks.attackers import (
    ATTACKS,
    FAR,
    INFLATED,
    NONE,
    SCALE,
    AttackedClients,
    choose_hostile,
    dominant_client,
)
from client_app import app
from fedfusion_flwr import RunConfig, protocol
from fedfusion_flwr.app.server import central_evaluation
from fedfusion_flwr.data import partition_for
from fedfusion_flwr.federation.in_process_grid import InProcessGrid
from fedfusion_flwr.federation.round import State
from fedfusion_flwr.fusion.server_step import is_parameter
from fedfusion_flwr.strategies import build_strategy
from tests.strategies.small import initial_model, small_config
from tests.support import Outcome, Recorder, assert_identical

CLIENTS = 10
HOSTILE = (3, 7)
pytestmark = pytest.mark.usefixtures("small")


def config_of(**settings: Any) -> RunConfig:
    values = {
        "num_clients": CLIENTS,
        "partition": "components",
        "planted_components": 2,
        "component_mixing": 0.5,
        "learning_rate": 0.1,
        "vae_steps": 10,
        "vae_refit_steps": 5,
        "num_components": 3,
        **settings,
    }
    return small_config(**values)


def train(
    attack: str, *, hostile: tuple[int, ...] = HOSTILE, clients: Any = None, **settings: Any
) -> Outcome:
    config = config_of(**settings)
    recorder = Recorder()
    strategy = build_strategy(config, [recorder])
    clients = clients or AttackedClients(app, attack, hostile)
    grid = InProcessGrid(clients, CLIENTS, config.to_run_config(), shuffle_replies=True)
    arrays = protocol.record_from_state(initial_model(config))
    rounds = config.num_server_rounds
    result = strategy.start(grid, arrays, rounds, evaluate_fn=central_evaluation(config))
    return Outcome(result, strategy, recorder.reports)


class Overheard:
    """Keeps every reply's model and metrics, by round and partition."""

    def __init__(self, clients: Any) -> None:
        self.clients = clients
        self.heard: dict[tuple[int, int], tuple[State, State, dict[str, Any]]] = {}

    def __call__(self, message: Message, context: Context) -> Message:
        received = protocol.state_from_record(message.content.array_records["arrays"])
        reply: Message = self.clients(message, context)
        identity = reply.content.config_records["client"]
        key = int(identity["server-round"]), int(context.node_config["partition-id"])  # type: ignore[arg-type,call-overload]
        sent = protocol.state_from_record(reply.content.array_records["arrays"])
        assert identity["partition-id"] == context.node_config["partition-id"]
        self.heard[key] = received, sent, dict(reply.content.metric_records["metrics"])
        return reply


@functools.cache
def heard(attack: str) -> dict[tuple[int, int], tuple[State, State, dict[str, Any]]]:
    ears = Overheard(AttackedClients(app, attack, HOSTILE))
    train(attack, clients=ears, strategy="fedavg", num_server_rounds=2)
    return ears.heard


def parameters(state: State) -> torch.Tensor:
    return torch.cat([v.double().flatten() for k, v in state.items() if is_parameter(k, v)])


@pytest.mark.parametrize("attack", ATTACKS)
def test_only_the_hostile_alter_their_replies(attack: str) -> None:
    for client in range(CLIENTS):
        _, honest, metrics = heard(NONE)[1, client]
        _, sent, told = heard(attack)[1, client]
        same = torch.equal(parameters(sent), parameters(honest)) and all(
            torch.equal(sent[key], value) for key, value in honest.items()
        )
        same = same and told["num-examples"] == metrics["num-examples"]
        # A replay differs from the second round on.
        assert same == (client not in HOSTILE or attack in (NONE, "replay"))


def test_what_each_attack_sends() -> None:
    received, honest, _ = heard(NONE)[1, HOSTILE[0]]
    update = parameters(honest) - parameters(received)

    def sent(attack: str) -> torch.Tensor:
        return parameters(heard(attack)[1, HOSTILE[0]][1]) - parameters(received)

    assert sent("nan").isnan().all()
    assert float(sent("huge").abs().max()) > 1e5
    torch.testing.assert_close(sent("sign-flip"), -update, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(sent("scaled"), SCALE * update, rtol=1e-4, atol=1e-5)
    # Trained, but for something else.
    cosine = torch.cosine_similarity(sent("label-flip"), update, dim=0)
    assert float(cosine) < 0.9
    assert 0.3 < float(sent("label-flip").norm() / update.norm()) < 3
    assert heard("inflated-count")[1, HOSTILE[0]][2]["num-examples"] == INFLATED
    far = heard("outlier-statistics")[1, HOSTILE[0]][1]
    mean, variance = honest["2.running_mean"], honest["2.running_var"]
    torch.testing.assert_close(far["2.running_mean"], mean + FAR * variance.sqrt())
    assert torch.equal(far["1.weight"], honest["1.weight"])


def test_a_replay_is_the_first_rounds_model_in_the_second() -> None:
    first, second = (heard("replay")[number, HOSTILE[0]][1] for number in (1, 2))
    assert_identical(second, first)


def test_a_mimic_shows_the_statistics_of_the_dominant_component() -> None:
    victim = dominant_client(config_of())
    assert victim not in HOSTILE
    components = partition_for(config_of()).main_components
    assert components is not None
    sizes = [int((components == c).sum()) for c in range(2)]
    assert sizes[components[victim]] == max(sizes)
    _, honest, _ = heard(NONE)[1, victim]
    for mimic in HOSTILE:
        received, sent, _ = heard("mimicry")[1, mimic]
        for key in ("2.running_mean", "2.running_var", "2.weight", "2.bias"):
            # Its random numbers are its own client's, its data the victim's.
            assert torch.equal(sent[key], honest[key])
        update = sent["1.weight"] - received["1.weight"]
        torch.testing.assert_close(update, received["1.weight"] - honest["1.weight"])


def test_more_hostile_clients_contain_the_fewer() -> None:
    few, more = (choose_hostile(20, share, 0) for share in (0.1, 0.4))
    assert (len(few), len(more)) == (2, 8)
    assert set(few) < set(more)
    assert choose_hostile(20, 0.0, 0) == []
    assert choose_hostile(20, 0.1, 1) != few


# --- against the strategies -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("attack", "defence"), [("nan", "none"), ("nan", "robust"), ("outlier-statistics", "robust")]
)
def test_the_dropped_leave_the_honest_result(attack: str, defence: str) -> None:
    """Whatever the dropped sent, the run is that of the others."""
    outcome = train(attack, defence=defence, num_server_rounds=2)
    others = train("huge", defence=defence, num_server_rounds=2)
    for result in (outcome, others):
        assert [report.metrics["replies-dropped"] for report in result.reports[1:]] == [2, 2]
    assert_identical(outcome.state, others.state)


def accuracy(attack: str, hostile: tuple[int, ...], **settings: Any) -> float:
    """Mean of the last three of six rounds."""
    outcome = train(attack, hostile=hostile, num_server_rounds=6, **settings)
    return sum(report.metrics["global-accuracy"] for report in outcome.reports[-3:]) / 3


@pytest.mark.parametrize("strategy", ["fedfusion", "fedavg"])
@pytest.mark.parametrize("attack", ["backwards", "outlier-statistics"])
def test_robust_beats_none(attack: str, strategy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two of ten are hostile: long updates backwards, far statistics."""
    if attack == "backwards":
        monkeypatch.setattr(attackers, "SCALE", -SCALE)
        attack = "scaled"
    none, robust = (
        accuracy(attack, HOSTILE, strategy=strategy, defence=defence, component_mixing=0.5)
        for defence in ("none", "robust")
    )
    assert robust > none + 0.1
    assert robust > 0.6


def test_robust_holds_a_count_that_rules() -> None:
    """Where clients' data are of one kind; how much is lost depends on the initial model."""
    settings = {"strategy": "fedavg", "component_mixing": 0.0}
    none, robust = (
        [
            accuracy("inflated-count", HOSTILE, defence=defence, seed=seed, **settings)
            for seed in range(5)
        ]
        for defence in ("none", "robust")
    )
    assert all(held > free for held, free in zip(robust, none, strict=True))
    assert sum(robust) / 5 > sum(none) / 5 + 0.05
    assert min(robust) > 0.6
