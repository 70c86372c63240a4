# SPDX-License-Identifier: Apache-2.0
"""FedBN: every client keeps its normalization layers; everything else is averaged."""

from __future__ import annotations

from typing import Any

import torch
from flwr.app import Message

from fedfusion_flwr.strategies import FedBN
from tests.strategies.planted import Listener
from tests.support import COUNTER, FakeClient, Outcome, honest_state, run_federation, tiny_model

CLIENTS = 3
EXAMPLES = torch.tensor([10.0, 20.0, 30.0])


def run(client: FakeClient, rounds: int = 2, **settings: Any) -> Outcome:
    return run_federation(
        "fedbn", client, CLIENTS, rounds=rounds, fraction_evaluate=1.0, **settings
    )


def away(reply: Message) -> None:
    raise OSError("away")


def test_clients_get_their_own_layers_back_and_the_average_of_the_others() -> None:
    client = Listener()
    run(client)
    start = tiny_model().state_dict()
    answers = [honest_state(start, k) for k in range(CLIENTS)]
    shares = (EXAMPLES / EXAMPLES.sum()).tolist()
    for moment in (("evaluate", 1), ("train", 2)):
        for k, state, _ in client.sent_for(*moment):
            for key, value in state.items():
                if key.startswith("norm."):
                    assert torch.equal(value, answers[k][key]), key
                else:
                    mean = sum(p * a[key] for p, a in zip(shares, answers, strict=True))
                    torch.testing.assert_close(value, mean)


def test_the_global_model_averages_all_layers_for_those_never_seen() -> None:
    outcome = run(Listener(), rounds=1)
    assert isinstance(outcome.strategy, FedBN)
    averaged = run_federation("fedavg", FakeClient(), CLIENTS, rounds=1).state
    for key, value in outcome.state.items():
        assert torch.equal(value, averaged[key])
    unseen = outcome.strategy.personal_model(99)
    assert all(torch.equal(unseen[key], outcome.state[key]) for key in unseen)
    assert set(outcome.strategy.state.normalization_of) == {0, 1, 2}


def test_a_client_that_skipped_rounds_has_the_layers_of_its_last() -> None:
    """Client 2 loses its replies of rounds 2 and 3; the counters show how often each trained."""
    client = Listener(away, hostile=(2,), spoil_rounds=(2, 3))
    outcome = run(client, rounds=4)
    sent = client.states_for("train", 4)
    assert [int(sent[k][COUNTER]) for k in range(CLIENTS)] == [3, 3, 1]
    # A client's counter that is behind the global one is not a step backwards.
    assert not outcome.reports[4].dropped


def test_a_failed_round_changes_nobodys_layers() -> None:
    """Round 2 has one reply too few."""
    client = Listener(away, hostile=(2,), spoil_rounds=(2,))
    outcome = run(client, rounds=2, min_valid_replies=3)
    assert isinstance(outcome.strategy, FedBN)
    assert outcome.reports[2].metrics["round-failed"] == 1
    assert [int(s[COUNTER]) for s in outcome.strategy.state.normalization_of.values()] == [1, 1, 1]
