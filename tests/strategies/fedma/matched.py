# SPDX-License-Identifier: Apache-2.0
"""FedMA over the tiny model, whose two layers make a pass two rounds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from flwr.app import Context, Message

from fedfusion_flwr.federation.in_process_grid import InProcessGrid
from fedfusion_flwr.randomness import torch_generator
from fedfusion_flwr.strategies import FedMA
from fedfusion_flwr.strategies.fedma.network import plain_network
from tests.support import (
    Outcome,
    Recorder,
    State,
    TamperingGrid,
    honest_state,
    initial_arrays,
    tiny_model,
)

HONEST = 5
NETWORK = plain_network(tiny_model(), "tiny", (2,))
OUT = "out.weight"


def other_state(number: int) -> State:
    """An untrained tiny model of a number; its units lie far apart."""
    generator = torch_generator(0, "test", number)
    model = tiny_model()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(5 * torch.randn(parameter.shape, generator=generator))
    return model.state_dict()


def run_fedma(
    client: Callable[[Message, Context], Message],
    num_clients: int,
    *,
    rounds: int = 2,
    grid: InProcessGrid | None = None,
    **settings: Any,
) -> Outcome:
    recorder = Recorder()
    arguments = {"min_train_nodes": 1, "min_available_nodes": 1, "fraction_evaluate": 0} | settings
    strategy = FedMA(network=NETWORK, callbacks=[recorder], **arguments)
    grid = grid or TamperingGrid(client, num_clients)
    result = strategy.start(grid, initial_arrays(), num_rounds=rounds)
    return Outcome(result, strategy, recorder.reports)


def trained(received: State, partition: int, times: int = 1) -> State:
    for _ in range(times):
        received = honest_state(received, partition)
    return received
