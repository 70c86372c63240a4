# SPDX-License-Identifier: Apache-2.0
"""Component models that train on beside the shared model in the last rounds, by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fedfusion_flwr import FedFusion, protocol
from fedfusion_flwr.errors import ArgumentError
from fedfusion_flwr.federation.in_process_grid import InProcessGrid
from fedfusion_flwr.federation.replies import ClientReply
from fedfusion_flwr.federation.round import KeepOldModel, RoundInProgress, RoundReport
from fedfusion_flwr.fusion import DistributionInference, FusionPosterior
from fedfusion_flwr.strategies import FedAvg
from fedfusion_flwr.strategies.coupling import CoupledRound, mixed_model
from tests.runs import CONFIG, Killed, assert_same_artifacts, go_dying, rows, write_pictures
from tests.strategies.planted import Listener
from tests.support import Outcome, Recorder, assert_identical, initial_arrays, tiny_model

CLIENTS = 4
PARAMETERS = [name for name, _ in tiny_model().named_parameters()]
GROUP = [0, 1, 0, 1]
STEP = {0: 0.01 * (10 * 1 + 30 * 3) / 40, 1: 0.01 * (20 * 2 + 40 * 4) / 60}
"""How far a group moves in a round: client k has 10 (k + 1) examples and moves by (k + 1) / 100."""


class TwoGroups(DistributionInference):
    """Clients 0, 2 and 1, 3; says whether that is clear."""

    clear = True

    def fit(self, vectors: Tensor, num_examples: Tensor, **_: Any) -> FusionPosterior:
        b = torch.eye(2, dtype=torch.float64)[torch.tensor(GROUP)]
        components = torch.zeros(2, vectors.shape[1], dtype=torch.float64)
        return FusionPosterior(b, b.mean(0), components, 0.0, clear_groups=self.clear)


class Unclear(TwoGroups):
    clear = False


def run(
    rounds: int = 3, inference: type[TwoGroups] = TwoGroups, **settings: Any
) -> tuple[Outcome, Listener]:
    """FedAvg's weights, so that the shared model is worked out easily."""
    recorder, clients = Recorder(), Listener()
    strategy = FedFusion(
        num_components=2,
        mixture="counts",
        inference=inference(2),
        callbacks=[recorder],
        evaluate_every=rounds,
        **settings,
    )
    grid = InProcessGrid(clients, CLIENTS, shuffle_replies=True)
    result = strategy.start(grid, initial_arrays(), rounds)
    return Outcome(result, strategy, recorder.reports), clients


def moved(state: dict[str, Tensor], by: float) -> dict[str, Tensor]:
    return {name: state[name] + by for name in PARAMETERS}


def assert_parameters(state: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name in PARAMETERS:
        torch.testing.assert_close(state[name], expected[name], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("coupling", [0.25, 1.0])
def test_component_models_train_on_and_the_shared_one_stays(coupling: float) -> None:
    """Round 1 is the shared model's: w_m = w_0 + s_m; then w_m <- (1 - l) w + l w_m + s_m.

    With l = 1 that is FedAvg in every group.
    """
    outcome, clients = run(component_coupling=coupling, coupled_rounds=2)
    start = protocol.state_from_record(initial_arrays())
    shared = (40 * STEP[0] + 60 * STEP[1]) / 100
    offset = dict(STEP)
    for server_round in (2, 3):
        sent = clients.states_for("train", server_round)
        for group, step in STEP.items():
            begun = (1 - coupling) * shared + coupling * offset[group]
            offset[group] = begun + step
            for client in (group, group + 2):
                assert_parameters(sent[client], moved(start, begun))
    if coupling == 1:
        assert offset == pytest.approx({group: 3 * step for group, step in STEP.items()})
    for client, state in clients.states_for("evaluate", 3).items():
        assert_parameters(state, moved(start, offset[GROUP[client]]))
    assert_parameters(outcome.state, moved(start, shared))
    assert_identical(outcome.state, outcome.reports[1].model)


def test_running_statistics_of_a_starting_model_are_those_of_the_mixture() -> None:
    """Means -1 and 3, variances 1 and 2, a quarter of the way: 0 and 0.75 + 0.5 + 3."""
    low, high = tiny_model().state_dict(), tiny_model().state_dict()
    for state, mean, variance in ((low, -1.0, 1.0), (high, 3.0, 2.0)):
        state["norm.running_mean"] = torch.full((2,), mean)
        state["norm.running_var"] = torch.full((2,), variance)
    found = mixed_model(FedAvg(), low, {1: high}, [0.4, 0.6], coupling=0.25)
    assert found["norm.running_mean"].tolist() == pytest.approx([0.0, 0.0])
    assert found["norm.running_var"].tolist() == pytest.approx([4.25, 4.25])
    assert mixed_model(FedAvg(), low, {}, [0.4, 0.6], coupling=0.25) is low


@pytest.mark.parametrize(
    ("settings", "inference"),
    [
        ({"component_coupling": 0.0, "coupled_rounds": 2}, TwoGroups),
        ({"component_coupling": 0.5, "coupled_rounds": 0}, TwoGroups),
        ({"component_coupling": 0.5, "coupled_rounds": 2}, Unclear),
    ],
)
def test_without_coupling_or_clear_groups_nothing_changes(
    settings: dict[str, Any], inference: type[TwoGroups]
) -> None:
    outcome, clients = run(inference=inference, **settings)
    plain, others = run(inference=inference)
    assert_identical(outcome.state, plain.state)
    for kind, server_round in (("train", 2), ("train", 3), ("evaluate", 3)):
        sent, expected = (each.states_for(kind, server_round) for each in (clients, others))
        for client in range(CLIENTS):
            assert_identical(sent[client], expected[client])
    assert [r.metrics for r in outcome.reports] == [r.metrics for r in plain.reports]


def test_coupled_rounds_teach_the_server_nothing_and_weigh_nobody() -> None:
    outcome, _ = run(component_coupling=0.5, coupled_rounds=2, average_decay=0.5)
    strategy = outcome.strategy
    assert isinstance(strategy, FedFusion)
    assert strategy.state.memory.rounds().tolist() == [1] * CLIENTS
    assert strategy.progress.average.count == 1
    assert_identical(outcome.state, outcome.reports[1].model)
    for report in outcome.reports[2:]:
        assert [row.weight for row in report.clients] == [0.0] * CLIENTS
        assert report.clusters == dict(enumerate(GROUP))
        assert report.metrics["components-coupled"] == 2
        assert report.fusion is None
    assert "components-coupled" not in outcome.reports[1].metrics


def test_component_models_are_kept_where_clients_do_not_evaluate() -> None:
    outcome, clients = run(component_coupling=1.0, coupled_rounds=2, fraction_evaluate=0.0)
    assert not clients.rounds_of("evaluate")
    start = protocol.state_from_record(initial_arrays())
    for group, step in STEP.items():
        assert_parameters(outcome.strategy.models()[f"m{group}"], moved(start, 3 * step))


def coupled(models: dict[int, dict[str, Tensor]], **settings: Any) -> CoupledRound:
    strategy = FedAvg(**settings)
    strategy.round = RoundInProgress(RoundReport(5), tiny_model().state_dict())
    return CoupledRound(strategy, {0: [1.0, 0.0], 1: [0.0, 1.0]}, models, 1.0)


def reply_of(client: int, by: float) -> ClientReply:
    state = tiny_model().state_dict()
    return ClientReply(client, client, 10, {}, {k: v + by for k, v in state.items()})


def test_strangers_train_from_the_shared_model_and_change_no_component() -> None:
    models = {0: tiny_model().state_dict(), 1: tiny_model().state_dict()}
    this = coupled(models)
    assert this.start_of(7) is this.strategy.current
    update = this.advance([reply_of(0, 0.5), reply_of(7, 9.0)])
    assert_parameters(models[0], moved(tiny_model().state_dict(), 0.5))
    assert_identical(models[1], tiny_model().state_dict())  # absent: its model stays
    assert update.model is this.strategy.current
    assert [row.client for row in update.rows] == [0, 7]
    assert this.advance([reply_of(7, 9.0)]).metrics["components-coupled"] == 0


def test_an_implausible_component_keeps_its_model() -> None:
    models = {0: tiny_model().state_dict(), 1: tiny_model().state_dict()}
    this = coupled(models, max_update_ratio=0.5)
    this.advance([reply_of(0, 100.0), reply_of(1, 0.01)])
    assert_identical(models[0], tiny_model().state_dict())
    assert_parameters(models[1], moved(tiny_model().state_dict(), 0.01))
    with pytest.raises(KeepOldModel, match="no component's fused model"):
        this.advance([reply_of(0, 100.0)])


@pytest.mark.parametrize(
    ("setting", "allowed"),
    [({"component_coupling": 1.5}, "from 0 to 1"), ({"coupled_rounds": -1}, "at least 0")],
)
def test_refused_in_one_sentence(setting: dict[str, Any], allowed: str) -> None:
    (name,) = setting
    with pytest.raises(ArgumentError, match=f"^FedFusion: {name} = .* is not allowed: {allowed}$"):
        FedFusion(**setting)


class AlwaysClear(FedFusion):
    """Its groups may be any."""

    name = ""

    def _groups_are_clear(self) -> bool:
        return self.state.posterior is not None


@pytest.mark.parametrize("dies_in", [4, 6])
def test_a_resumed_run_ends_like_a_whole_one(tmp_path: Path, dies_in: int) -> None:
    """Rounds 4 to 6 are coupled."""
    config = CONFIG | {
        "data-root": str(write_pictures(tmp_path / "pictures.npz")),
        "strategy": f"{__name__}:AlwaysClear",
        "component-coupling": 0.5,
        "coupled-rounds": 3,
        "evaluation-normalization": "own",
    }
    whole = go_dying(tmp_path / "whole", **config)
    cut = tmp_path / "cut"
    with pytest.raises(Killed):
        go_dying(cut, dies_in=dies_in, **config)
    resumed = go_dying(cut, seed=1, **config, **{"resume-from": str(cut)})
    assert resumed.digest == whole.digest
    assert_same_artifacts(tmp_path / "whole", cut)
    assert ["components-coupled" in row for row in rows(cut)] == [False] * 4 + [True] * 3
