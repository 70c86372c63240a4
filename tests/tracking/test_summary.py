# SPDX-License-Identifier: Apache-2.0
"""summary.json and the models of a finished run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fedfusion_flwr import protocol
from fedfusion_flwr.federation.round import RoundReport
from fedfusion_flwr.tracking import RunSummary
from tests.runs import rows, run_in_process
from tests.strategies.small import small_config


def summarized(*rounds: dict[str, float]) -> RunSummary:
    summary = RunSummary()
    for number, metrics in enumerate(rounds):
        summary.on_round_end(RoundReport(number, metrics=metrics))
    return summary


def test_last_and_best_round_by_hand() -> None:
    """Round 0, the untrained model, does not count; the first of equals stays the best."""
    summary = summarized(
        {"global-accuracy": 0.9},
        {"global-accuracy": 0.5, "personalized-accuracy": 0.4, "bytes-up": 10.0},
        {"global-accuracy": 0.7, "bytes-up": 5.0, "client-steps": 3.0},
        {"global-accuracy": 0.7, "personalized-accuracy": 0.3},
    )
    assert summary.summary() == {
        "last-round": {
            "global-accuracy": {"round": 3, "global-accuracy": 0.7},
            "personalized-accuracy": {"round": 3, "personalized-accuracy": 0.3},
        },
        "best-round": {
            "global-accuracy": {"round": 2, "global-accuracy": 0.7},
            "personalized-accuracy": {"round": 1, "personalized-accuracy": 0.4},
        },
        "costs": {
            "bytes-down": 0.0,
            "bytes-up": 15.0,
            "client-steps": 3.0,
            "extra-forward-examples": 0.0,
            "server-aggregations": 0.0,
        },
    }
    assert str(summary) == (
        "Last round: 3, global accuracy 0.7000; Last round: 3, personalized accuracy 0.3000; "
        "Best round: 2, global accuracy 0.7000; Best round: 1, personalized accuracy 0.4000"
    )


def test_accuracy_that_was_last_measured_earlier_keeps_its_round() -> None:
    summary = summarized({}, {"personalized-accuracy": 0.4}, {"global-accuracy": 0.5})
    assert summary.summary()["last-round"]["personalized-accuracy"]["round"] == 1


@pytest.mark.usefixtures("small")
def test_files_of_a_run_with_several_models(tmp_path: Path) -> None:
    settings = {"num_clusters": 2, "fraction_evaluate": 1.0, "evaluate_every": 2}
    config = small_config(strategy="ifca", output_dir=str(tmp_path), **settings)
    run_in_process(config.to_run_config())
    metrics = rows(tmp_path)
    summary = json.loads((tmp_path / "summary.json").read_text())
    for name in ("global-accuracy", "personalized-accuracy"):
        measured = [(row["round"], row[name]) for row in metrics[1:] if name in row]
        last = summary["last-round"][name]
        assert (last["round"], last[name]) == measured[-1]
        assert summary["best-round"][name][name] == max(value for _, value in measured)
    assert [row["round"] for row in metrics if "personalized-accuracy" in row] == [2, 3]
    for name, total in summary["costs"].items():
        assert total == pytest.approx(sum(row.get(name, 0) for row in metrics))

    models = protocol.unpack_states(load_file(tmp_path / "final_models.safetensors"))
    final = load_file(tmp_path / "final_model.safetensors")
    assert sorted(models) == ["c0", "c1"]
    key = "1.weight"
    assert not torch.equal(models["c0"][key], models["c1"][key])
    mean = (models["c0"][key].double() + models["c1"][key].double()) / 2
    torch.testing.assert_close(final[key], mean.float())
    assert all(model.keys() == final.keys() for model in models.values())


@pytest.mark.usefixtures("small")
def test_a_strategy_with_one_model_leaves_one(tmp_path: Path) -> None:
    config = small_config(strategy="fedprox", num_server_rounds=1, output_dir=str(tmp_path))
    run_in_process(config.to_run_config())
    assert (tmp_path / "final_model.safetensors").exists()
    assert not (tmp_path / "final_models.safetensors").exists()
