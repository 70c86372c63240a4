# SPDX-License-Identifier: Apache-2.0
"""Statements in docs/security.md about Flower's privacy tools hold."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from flwr.app import ConfigRecord, Context, Message, MessageType, RecordDict
from flwr.clientapp.mod import LocalDpMod
from flwr.common.constant import ErrorCode
from flwr.serverapp.strategy import DifferentialPrivacyServerSideFixedClipping
from flwr.supercore.privacy_accounting import NeighboringRelation, PrivacyConfig, SamplingMethod

from client_app import app
from fedfusion_flwr import FedAvg, FedFusion, protocol
from fedfusion_flwr.config import RunConfig
from fedfusion_flwr.data import data_for
from fedfusion_flwr.federation.in_process_grid import InProcessGrid
from fedfusion_flwr.models import model_for

ACCOUNTANT: Any = SimpleNamespace(
    config=PrivacyConfig(
        target_delta=1e-5,
        population_size=10,
        neighboring_relation=NeighboringRelation.ADD_OR_REMOVE_ONE,
        sampling_method=SamplingMethod.NO_AMPLIFICATION,
    )
)


@pytest.mark.parametrize("strategy", [FedFusion(), FedAvg()], ids=lambda s: type(s).__name__)
def test_accounted_differential_privacy_refuses_these_strategies(strategy: Any) -> None:
    with pytest.raises(ValueError, match=r"requires a strategy using FedAvg\.aggregate_train"):
        DifferentialPrivacyServerSideFixedClipping(strategy, 1.0, 1.0, 10, accountant=ACCOUNTANT)


def test_local_differential_privacy_makes_an_error_of_every_reply() -> None:
    mod = LocalDpMod(clipping_norm=1.0, sensitivity=1.0, epsilon=1.0, delta=1e-5)

    def with_mod(message: Message, context: Context) -> Message:
        return mod(message, context, app)

    config = RunConfig()
    model = model_for(config, data_for(config))
    content = RecordDict(
        {
            protocol.ARRAYS: protocol.record_from_state(model.state_dict()),
            protocol.CONFIG: ConfigRecord({protocol.SERVER_ROUND: 1}),
        }
    )
    for client, failed in ((app, False), (with_mod, True)):
        grid = InProcessGrid(client, 10)
        node = next(iter(grid.nodes))
        (reply,) = grid.send_and_receive([Message(content, node, MessageType.TRAIN)])
        assert reply.has_error() is failed
    assert reply.error.code == ErrorCode.MOD_FAILED_PRECONDITION
