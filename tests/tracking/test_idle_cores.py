# SPDX-License-Identifier: Apache-2.0
"""The hint for simulations that leave cores idle."""

from __future__ import annotations

import pytest

from fedfusion_flwr.federation.round import ClientRow, RoundReport
from fedfusion_flwr.tracking import IdleCores


def round_of(seconds: list[float], waited: float, server_round: int = 2) -> RoundReport:
    rows = [ClientRow(i, i, metrics={"train-seconds": s}) for i, s in enumerate(seconds)]
    return RoundReport(server_round, clients=rows, seconds={"train": waited - 0.5, "transfer": 0.5})


def test_clients_that_train_one_after_the_other_give_a_hint() -> None:
    """Ten clients of 1 s in 10 s keep 1.0 of 2 cores busy."""
    advice = IdleCores(2, 1).advice(round_of([1.0] * 10, 10.0))
    assert advice is not None
    assert "clients kept 1.0 of 2 cores busy" in advice
    assert "client-resources-num-cpus=1" in advice
    assert "trains 2 at a time" in advice


@pytest.mark.parametrize(
    ("cores", "threads", "seconds", "waited"),
    [
        (2, 1, [1.0] * 10, 6.0),  # 1.7 of 2
        (8, 4, [1.0] * 4, 2.5),  # 4 threads x 4 s in 2.5 s are 6.4 of 8
        (8, 1, [1.0] * 3, 1.2),  # no more than three clients: 2.5 of 3
        (2, 1, [], 0.0),
    ],
)
def test_no_hint_where_nothing_is_wasted(
    cores: int, threads: int, seconds: list[float], waited: float
) -> None:
    assert IdleCores(cores, threads).advice(round_of(seconds, waited)) is None


def test_it_is_logged_once_and_not_for_the_first_round(caplog: pytest.LogCaptureFixture) -> None:
    callback = IdleCores(2, 1)
    with caplog.at_level("INFO", logger="flwr"):
        for server_round in range(5):
            callback.on_round_end(round_of([1.0] * 10, 10.0, server_round))
    (hint,) = caplog.messages
    assert hint.startswith("hint: ")
