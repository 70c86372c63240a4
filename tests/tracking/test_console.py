# SPDX-License-Identifier: Apache-2.0
"""The console line of a round, and the hint for simulations that leave cores idle."""

from __future__ import annotations

import pytest
import torch

from fedfusion_flwr.federation.round import ClientRow, FusionSnapshot, RoundReport
from fedfusion_flwr.fusion import FusionPosterior
from fedfusion_flwr.tracking import ConsoleLine, IdleCores
from tests.support import FakeClient, run_federation


def fusion(mixture: list[float]) -> FusionSnapshot:
    pi = torch.tensor(mixture, dtype=torch.float64)
    posterior = FusionPosterior(torch.eye(len(mixture)), pi, torch.zeros(len(mixture), 1), 0.0)
    return FusionSnapshot(list(range(len(mixture))), posterior, pi, pi)


def test_untrained_model() -> None:
    report = RoundReport(0, metrics={"global-accuracy": 0.0987, "global-loss": 2.3026})
    assert ConsoleLine(30).line(report) == "round  0/30 | test acc 0.0987 loss 2.303"


def test_everything_at_once() -> None:
    report = RoundReport(
        7,
        num_sampled=10,
        metrics={
            "train-loss": 0.51249,
            "global-accuracy": 0.9,
            "global-loss": 0.25,
            "components-occupied": 3.0,
            "adjusted-rand-index": 1.0,
            "replies-dropped": 2.0,
            "fusion-fallback": 0.0,
        },
        seconds={"evaluate": 0.11, "train": 2.0, "sample": 0.04},
        fusion=fusion([0.2, 0.0, 0.5, 0.3]),
    )
    assert ConsoleLine(30).line(report) == (
        "round  7/30 | train loss 0.512 | test acc 0.9000 loss 0.250 | "
        "components 3 [0.50 0.30 0.20] | ARI 1.00 | dropped 2/10 | "
        "sample 0.0 train 2.0 evaluate 0.1 s"
    )


def test_bad_news_stands_out() -> None:
    report = RoundReport(3, 5, metrics={"round-failed": 1.0, "fusion-fallback": 1.0})
    line = ConsoleLine(3).line(report)
    assert "dropped 0/5" in line
    assert "KEPT OLD MODEL" in line
    assert "INFERENCE FELL BACK" in line


def test_exchanges_before_the_round_are_shown() -> None:
    """A cold start of four clients and a cohort of one: five replies in total, good or bad."""
    report = RoundReport(
        1,
        num_sampled=1,
        metrics={"replies-valid": 3.0, "replies-dropped": 2.0},
        seconds={"exchange": 1.5, "train": 0.5},
    )
    assert ConsoleLine(1).line(report).endswith("dropped 2/5 | exchange 1.5 train 0.5 s")


def test_line_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    callback = ConsoleLine(2)
    report = RoundReport(1, metrics={"train-loss": 1.0})
    with caplog.at_level("INFO", logger="flwr"):
        callback.on_round_end(report)
    assert caplog.messages == [callback.line(report)]


def test_flowers_own_lines_are_left_out(caplog: pytest.LogCaptureFixture) -> None:
    def crash(_: object) -> None:
        raise OSError("no disk")

    with caplog.at_level("INFO", logger="flwr"):
        run_federation("fedavg", FakeClient(crash, (1,)), 2)
    assert not any("ROUND" in line for line in caplog.messages)
    assert sum("dropped (error): OSError: no disk" in line for line in caplog.messages) == 2


# --- idle cores


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
