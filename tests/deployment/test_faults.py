# SPDX-License-Identifier: Apache-2.0
"""Faults that a federation of real processes survives, as docs/deploy.md promises."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from scripts.programs import stop
from tests.deployment.harness import PATIENCE, Deployment
from tests.engine.harness import copy_of_app

pytestmark = [
    pytest.mark.engine,
    pytest.mark.slow,
    pytest.mark.faults,
    pytest.mark.timeout(1800),
]

ALL = {0: "ok", 1: "ok", 2: "ok"}


@pytest.fixture(scope="module")
def deployment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    """A SuperLink and three SuperNodes with TLS and authentication, shared by the tests."""
    with Deployment(tmp_path_factory.mktemp("deployment")) as deployment:
        yield deployment


@pytest.fixture
def healthy(deployment: Deployment) -> Deployment:
    deployment.heal()
    return deployment


@pytest.fixture(scope="module")
def hanging_app(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the app in which the client of partition 2 never ends its training."""
    modules = {"hanging_client_app": HANGING_CLIENT_APP}
    return copy_of_app(tmp_path_factory.mktemp("hanging"), modules, client="hanging_client_app:app")


def test_three_rounds_over_tls(healthy: Deployment) -> None:
    run = healthy.begin(num_server_rounds=3)
    assert healthy.finish(run) == "finished:completed"
    assert [row["replies-valid"] for row in run.metrics()] == [3, 3, 3]
    assert [run.clients(number) for number in (1, 2, 3)] == [ALL, ALL, ALL]
    assert run.metrics()[-1]["global-accuracy"] > 0.5
    assert (run.directory / "final_model.safetensors").exists()


def test_a_supernode_whose_key_nobody_registered_is_refused(healthy: Deployment) -> None:
    stranger = healthy.start_supernode(7)
    del healthy.supernodes[7]
    assert stranger.wait(PATIENCE)
    assert stranger.exit_code == 1
    assert "Failed to activate SuperNode" in stranger.output()
    assert "SuperNode ID" not in stranger.output()
    nodes = healthy.flwr("supernode", "list", "--format", "json")["nodes"]
    assert [node["status"] for node in nodes] == ["online"] * 3


def test_a_killed_supernode_costs_its_reply_and_may_return(healthy: Deployment) -> None:
    run = healthy.begin(num_server_rounds=4, round_timeout=240.0)
    healthy.wait_for_round(run, 1)
    healthy.wait_for_training(1, 2)
    healthy.kill_supernode(1)
    # Until its heartbeats are overdue the SuperLink takes it for online and refuses it.
    assert healthy.bring_back(1) > 0
    assert healthy.finish(run) == "finished:completed"
    valid = [row["replies-valid"] for row in run.metrics()]
    # The round in which it was killed, or the next one if it had just answered.
    lost = [number for number, count in enumerate(valid, start=1) if count == 2]
    assert lost in ([2], [3], [2, 3])
    assert run.clients(1) == run.clients(4) == ALL
    for server_round in lost:
        answers = run.clients(server_round)
        # Missing in the round that asked it; the next round may not ask it at all.
        assert answers[0] == answers[2] == "ok" != answers.get(1)
    assert run.clients(lost[0]).get(1) == "missing"


def test_a_supernode_that_comes_late_takes_part_from_the_next_round(healthy: Deployment) -> None:
    stop([healthy.supernodes.pop(2)])
    run = healthy.begin(num_server_rounds=4, node_timeout=5.0, min_available_clients=2)
    healthy.wait_for_round(run, 1)
    healthy.bring_back(2)
    assert healthy.finish(run) == "finished:completed"
    assert run.clients(1) == {0: "ok", 1: "ok"}
    assert run.clients(4) == ALL


def test_a_halted_supernode_is_given_up_and_goes_on_when_it_wakes(healthy: Deployment) -> None:
    run = healthy.begin(num_server_rounds=4, round_timeout=240.0)
    healthy.wait_for_training(2, healthy.trainings(2) + 1)
    halted = healthy.supernodes[2]
    halted.send(signal.SIGSTOP)
    healthy.wait_for_round(run, 1)
    halted.send(signal.SIGCONT)
    assert healthy.finish(run) == "finished:completed"
    first = run.clients(1)
    assert first[0] == first[1] == "ok" != first[2]
    assert run.clients(4) == ALL


def test_a_hanging_client_is_given_up_after_the_round_timeout(
    healthy: Deployment, hanging_app: Path
) -> None:
    timeout = 100.0
    run = healthy.begin(hanging_app, num_server_rounds=1, round_timeout=timeout)
    assert healthy.finish(run) == "finished:completed"
    assert run.clients(1) == {0: "ok", 1: "ok", 2: "missing"}
    seconds = run.metrics()[0]["seconds"]
    assert seconds["train"] + seconds["transfer"] == pytest.approx(timeout, rel=0.2)
    # Its SuperNode would wait for the hanging ClientApp in later runs too.
    healthy.kill_supernode(2)


def test_a_superlink_that_restarts_with_its_database_keeps_the_federation(
    healthy: Deployment,
) -> None:
    before = healthy.flwr("supernode", "list", "--format", "json")["nodes"]
    interrupted = healthy.begin(num_server_rounds=20)
    healthy.wait_for_round(interrupted, 1)
    healthy.kill_superlink()
    healthy.start_superlink()
    # The ServerApp died with its SuperLink: its lease runs out and the run fails.
    assert healthy.finish(interrupted) == "finished:failed"
    assert 1 <= len(interrupted.metrics()) < 20
    assert (interrupted.directory / "best_model.safetensors").exists()

    healthy.check()  # the SuperNodes waited for their SuperLink
    after = healthy.flwr("supernode", "list", "--format", "json")["nodes"]
    assert {node["node-id"] for node in after} == {node["node-id"] for node in before}
    again = healthy.begin(num_server_rounds=1)
    assert healthy.finish(again) == "finished:completed"
    assert again.clients(1) == ALL


HANGING_CLIENT_APP = """
import time

from flwr.clientapp import ClientApp

from fedfusion_flwr.app.client import handle_train

app = ClientApp()


@app.train()
def train(message, context):
    if context.node_config["partition-id"] == 2:
        time.sleep(3600)
    return handle_train(message, context)
"""
