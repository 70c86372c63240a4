# SPDX-License-Identifier: Apache-2.0
"""Noise on the statistics that clients upload for inference, and only there."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from flwr.app import Message

from fedfusion_flwr import protocol
from fedfusion_flwr.fusion import NormalizationStatistics
from tests.runs import ask_client, state_of, statistics_of
from tests.strategies.small import initial_model, small_config
from tests.support import assert_identical


def statistics(channels: int) -> NormalizationStatistics:
    ones = torch.ones(channels)
    return NormalizationStatistics(3 * ones, 2 * ones, 0.5 * ones, -4 * ones)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_noise_is_measured_in_standard_deviations_of_the_data() -> None:
    """Over many channels: std 2 moves means by 0.1 * 2, scale 4 moves shifts by 0.1 * 4."""
    blurred = statistics(100_000).blurred(0.1, generator())
    for value, center, spread in (
        (blurred.mean, 3, 0.2),
        (blurred.std.log(), torch.tensor(2.0).log(), 0.1),
        (blurred.shift, 0.5, 0.4),
        ((-blurred.scale).log(), torch.tensor(4.0).log(), 0.1),
    ):
        assert float(value.mean()) == pytest.approx(float(center), abs=0.01)
        assert float(value.std()) == pytest.approx(spread, rel=0.02)
    moved = torch.stack([blurred.mean, blurred.std, blurred.shift, blurred.scale])
    # No two kinds of numbers share their noise.
    assert float((moved.corrcoef() - torch.eye(4)).abs().max()) < 0.02


def test_the_amount_is_a_factor_of_one_draw() -> None:
    little, much = (statistics(8).blurred(amount, generator()) for amount in (0.1, 1.0))
    torch.testing.assert_close(10 * (little.mean - 3), much.mean - 3)
    assert float(much.std.min()) > 0


def train(partition: int, server_round: int = 1, kind: str = "train", **settings: Any) -> Message:
    config = small_config(**settings)
    node = {"partition-id": partition, "num-partitions": config.num_clients}
    arrays = protocol.record_from_state(initial_model(config))
    return ask_client(config.to_run_config(), node, arrays, kind, {"server-round": server_round})


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("source", ["local", "probe"])
def test_only_the_record_is_blurred(source: str) -> None:
    plain = train(0, statistics_source=source)
    noisy = train(0, statistics_source=source, statistics_noise=0.5)
    assert_identical(state_of(plain), state_of(noisy))
    exact, blurred = statistics_of(plain), statistics_of(noisy)
    distance = ((blurred.mean - exact.mean) / exact.std).abs()
    assert 0 < float(distance.min()) <= float(distance.max()) < 0.5 * 5
    if source == "local":
        # What the record hides, the model sent with it still shows.
        shown = NormalizationStatistics.from_state_dict(state_of(noisy))
        torch.testing.assert_close(shown.vector(), exact.vector())


@pytest.mark.usefixtures("small")
def test_every_client_and_round_draws_its_own_and_draws_it_again() -> None:
    def noise(partition: int, server_round: int) -> torch.Tensor:
        plain = statistics_of(train(partition, server_round))
        noisy = statistics_of(train(partition, server_round, statistics_noise=1.0))
        return (noisy.mean - plain.mean) / plain.std

    first = noise(0, 1)
    torch.testing.assert_close(noise(0, 1), first)
    assert not torch.allclose(noise(1, 1), first)
    assert not torch.allclose(noise(0, 2), first)


@pytest.mark.usefixtures("small")
def test_answers_to_queries_are_blurred_too() -> None:
    plain, noisy = (statistics_of(train(0, kind="query", statistics_noise=a)) for a in (0.0, 1.0))
    assert not torch.allclose(plain.mean, noisy.mean)
