# SPDX-License-Identifier: Apache-2.0
"""Made-up replies neither stop the server nor enter its model.

A short run with fixed examples. For a long one with new examples:

    FUZZ_EXAMPLES=1200 pytest tests/fuzz --timeout 0 --hypothesis-show-statistics
"""

from __future__ import annotations

import functools
import math
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings

from fedfusion_flwr.tracking import (
    BestModel,
    ComponentRecovery,
    ConsoleLine,
    FusionArchive,
    RunDirectory,
    RunLog,
    RunSummary,
)
from tests.fuzz.mutations import SPOIL
from tests.support import (
    FakeClient,
    Outcome,
    Recorder,
    Spoil,
    TamperingGrid,
    assert_identical,
    initial_arrays,
    make_strategy,
)

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "0"))
fuzzing = functools.partial(
    settings, deadline=None, derandomize=not EXAMPLES, suppress_health_check=list(HealthCheck)
)
HONEST = 4
REASONS = {
    *("class-counts", "cluster", "dtype", "error", "examples", "nonfinite"),
    *("shape", "size", "stale", "statistics", "structure", "update"),
}
STRATEGIES = ("fedfusion", "fedavg", "ifca")


def federation(name: str, client: FakeClient, count: int, folder: Path) -> Outcome:
    """Run two rounds with every callback."""
    recorder, directory = Recorder(), RunDirectory(folder)
    strategy = make_strategy(name, recorder, fraction_evaluate=1.0, evaluate_every=2)
    strategy.callbacks += [
        ComponentRecovery(np.eye(2)[np.arange(HONEST + 1) % 2]),
        RunLog(directory),
        FusionArchive(directory),
        BestModel(directory, "personalized-accuracy"),
        RunSummary(),
        ConsoleLine(2),
    ]
    grid = TamperingGrid(client, count)
    result = strategy.start(grid, initial_arrays(), num_rounds=2)
    return Outcome(result, strategy, recorder.reports)


@pytest.fixture(scope="module")
def honest(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Outcome]:
    folder = tmp_path_factory.mktemp("honest")
    return {name: federation(name, FakeClient(), HONEST, folder / name) for name in STRATEGIES}


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_run_survives_any_reply(
    name: str, honest: dict[str, Outcome], tmp_path_factory: pytest.TempPathFactory
) -> None:
    @fuzzing(max_examples=EXAMPLES // 10 or 25)
    @given(SPOIL)
    def survives(spoil: Spoil) -> None:
        folder = tmp_path_factory.mktemp("run") / "run"
        outcome = federation(name, FakeClient(spoil, hostile=(HONEST,)), HONEST + 1, folder)
        check(outcome, honest[name])

    survives()


def check(outcome: Outcome, honest: Outcome) -> None:
    """Counts add up, the model is finite, and dropped replies leave no trace in it."""
    believed = False
    for report in outcome.reports[1:]:
        assert report.num_sampled == HONEST + 1
        metrics = report.metrics
        assert metrics["replies-valid"] + metrics["replies-dropped"] == HONEST + 1
        assert {row.client for row in report.clients} == set(range(HONEST + 1))
        assert {row.client for row in report.dropped} <= {HONEST}
        for row in report.dropped:
            assert row.dropped in REASONS
            assert row.detail
            assert len(row.detail) <= 300
        believed = believed or not report.dropped
        assert all(math.isfinite(value) for value in report.metrics.values())
    assert all(value.isfinite().all() for value in outcome.state.values())
    if not believed:
        assert_identical(outcome.state, honest.state)
        models, others = outcome.strategy.models(), honest.strategy.models()
        assert models.keys() == others.keys()
        for key, model in models.items():
            assert_identical(model, others[key])
