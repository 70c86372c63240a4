# SPDX-License-Identifier: Apache-2.0
"""The loop over the rounds: how many models are out for evaluation at a time."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
from flwr.app import Message

from fedfusion_flwr.federation.in_process_grid import InProcessGrid
from fedfusion_flwr.federation.strategy import MODELS_IN_FLIGHT
from tests.support import FakeClient, run_federation

CLIENTS = 2 * MODELS_IN_FLIGHT + 3


class CountingGrid(InProcessGrid):
    """Notes of every exchange its kind, its messages and its different models."""

    def __init__(self) -> None:
        super().__init__(FakeClient(), CLIENTS)
        self.exchanges: list[tuple[str, int, int]] = []

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        messages = list(messages)
        models = {id(message.content["arrays"]) for message in messages}
        kind = messages[0].metadata.message_type
        self.exchanges.append((kind, len(messages), len(models)))
        return super().send_and_receive(messages, timeout=timeout)


@pytest.mark.parametrize(
    ("name", "evaluations"),
    [
        ("fedavg", [(CLIENTS, 1)]),
        ("ifca", [(CLIENTS, 1)]),
        ("fesem", [(CLIENTS, 2)]),
        ("fedbn", [(MODELS_IN_FLIGHT, MODELS_IN_FLIGHT)] * 2 + [(3, 3)]),
    ],
)
def test_few_models_are_out_at_a_time(name: str, evaluations: list[tuple[int, int]]) -> None:
    """Clients with models of their own are evaluated in parts; equal models are encoded once."""
    grid = CountingGrid()
    outcome = run_federation(name, FakeClient(), CLIENTS, rounds=1, grid=grid, fraction_evaluate=1)
    seen = [(messages, models) for kind, messages, models in grid.exchanges if kind == "evaluate"]
    assert seen == evaluations
    assert outcome.reports[1].metrics["evaluate-replies-valid"] == CLIENTS
