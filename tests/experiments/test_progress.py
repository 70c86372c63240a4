# SPDX-License-Identifier: Apache-2.0
"""What is expected of work to come, and which candidate wins."""

from __future__ import annotations

import pytest

from fedfusion_flwr.experiments.progress import Clock, Timed, shown
from fedfusion_flwr.experiments.tuning import candidates, score, winners
from fedfusion_flwr.experiments.work import Grid, Overrides, Tuning
from tests.experiments.folders import Row, cell, metrics


def test_expected_seconds() -> None:
    clock = Clock()
    assert clock.expected("main", 10.0) == 10.0
    assert clock.expected("main", 0.0) == 0.0
    clock.finished.append(Timed("tune", 10.0, 15.0))
    # Everything takes half as long again, until there is something of the same kind.
    assert clock.expected("main", 10.0) == 15.0
    clock.finished += [Timed("main", 10.0, 4.0), Timed("main", 20.0, 8.0)]
    assert clock.expected("main", 10.0) == pytest.approx(4.0)
    assert clock.expected("main", 0.0) == 6.0
    assert clock.expected("tune", 10.0) == 15.0


def test_nothing_declared() -> None:
    clock = Clock([Timed("main", 0.0, 3.0), Timed("main", 0.0, 5.0)])
    assert clock.expected("main", 0.0) == 4.0
    assert clock.expected("other", 0.0) == 4.0
    assert clock.expected("other", 9.0) == 9.0


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 s"), (99, "99 s"), (100, "2 min"), (3599, "1 h 00 min"), (3900, "1 h 05 min")],
)
def test_shown(seconds: float, text: str) -> None:
    assert shown(seconds) == text


def row(strategy: str, seed: int, accuracies: list[float], candidate: int = 0) -> Row:
    return {**cell(strategy, seed, metrics(accuracies)), "candidate": candidate}


def test_score_is_the_mean_of_the_last_five_values() -> None:
    one = row("fedavg", 0, [0.9, 0.0, 0.1, 0.2, 0.3, 0.4, 0.5])
    assert score(one, "global-accuracy") == pytest.approx(0.3)
    # Losses of rounds 2 to 6 are 2/3, 2/4, ...
    assert score(one, "global-loss") == pytest.approx(-(2 / 3 + 2 / 4 + 2 / 5 + 2 / 6 + 2 / 7) / 5)
    assert score(one, "personalized-accuracy") == float("-inf")


def test_winners() -> None:
    a: Overrides = {"learning-rate": 0.1}
    b: Overrides = {"learning-rate": 0.2}
    grid = Grid("tune", [], ["mnist-5k"], ["lenet"], ["iid"], [0, 1], {})
    decides = {"fedavg": "global-accuracy", "fedprox": "global-accuracy"}
    tuning = Tuning(grid, {"fedavg": [a, b], "fedprox": [a, b]}, decides)
    rows = [
        row("fedavg", 0, [0.1, 0.5]),
        row("fedavg", 1, [0.1, 0.7]),
        row("fedavg", 0, [0.1, 0.9], candidate=1),
        row("fedavg", 1, [0.1, 0.1], candidate=1),
        # Half of its cells: not in the running.
        row("fedprox", 0, [0.1, 0.9]),
    ]
    table = candidates(tuning, rows)
    assert table["candidate"][1] == "learning-rate = 0.2"
    assert list(table["score"].dropna()) == [pytest.approx(0.6), pytest.approx(0.5)]
    assert list(table["chosen"]) == [True, False, False, False]
    assert winners(tuning, table) == {"fedavg": a}
