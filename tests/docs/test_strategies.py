# SPDX-License-Identifier: Apache-2.0
"""docs/strategies.md is true: its examples run, its table names every strategy and key."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from fedfusion_flwr.federation.strategy import FederatedStrategy
from fedfusion_flwr.strategies import keys_of, registry
from fedfusion_flwr.tracking.summary import COSTS
from tests.strategies.planted import PlantedClients, flat, run_planted, start_state

TEXT = (Path(__file__).parents[2] / "docs" / "strategies.md").read_text(encoding="utf-8")
CODE = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)


def example(number: int) -> FederatedStrategy:
    """The strategy that the code ends with."""
    names: dict[str, Any] = {"torch": torch}
    exec(CODE[number], names)
    strategy = names["strategy"]
    assert isinstance(strategy, FederatedStrategy)
    return strategy


def examples_of(client: int) -> int:
    return 50 + 100 * (client % 2)


def test_there_are_two_examples_of_at_most_fifteen_lines() -> None:
    assert len(CODE) == 2
    assert all(len([line for line in code.splitlines() if line.strip()]) <= 15 for code in CODE)


def test_the_strategy_with_one_model_averages_uniformly() -> None:
    strategy = example(0)
    strategy.fraction_train, strategy.fraction_evaluate = 1.0, 0.0
    clients = PlantedClients(lambda client: client, examples=examples_of)
    outcome = run_planted(strategy, clients, 4, rounds=1)
    mean = torch.stack([clients.update(c, 1).double() for c in range(4)]).mean(0)
    torch.testing.assert_close(
        flat(outcome.state), flat(start_state()) + mean, rtol=1e-5, atol=1e-5
    )
    assert [row.weight for row in outcome.reports[1].clients] == [0.25] * 4


def test_the_strategy_with_several_models_keeps_them_by_size() -> None:
    strategy = example(1)
    strategy.fraction_evaluate = 0.0
    clients = PlantedClients(lambda client: client, examples=examples_of)
    run_planted(strategy, clients, 4, rounds=3)
    assert strategy.state.of == {0: 0, 1: 1, 2: 0, 3: 1}
    sent = {client: flat(state) for client, state, _ in clients.sent_for("train", 3)}
    assert torch.equal(sent[0], sent[2])
    assert torch.equal(sent[1], sent[3])
    assert not torch.equal(sent[0], sent[1])


@pytest.mark.parametrize("name", registry())
def test_every_strategy_has_its_row_and_its_paragraph(name: str) -> None:
    assert re.search(rf"^\| `{name}` \|", TEXT, re.MULTILINE)
    assert re.search(rf"\*\*`{name}`\*\*", TEXT)


def test_keys_of_the_rivals_and_the_costs_are_named() -> None:
    ours = {"fedfusion"}
    keys = {key for name, rival in registry().items() if name not in ours for key in keys_of(rival)}
    for key in keys | set(COSTS):
        assert f"`{key.replace('_', '-')}" in TEXT, key
