# SPDX-License-Identifier: Apache-2.0
"""Which models a strategy accepts: refused at the start of a run, or run to the end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Context, Message, MetricRecord, RecordDict
from torch import nn

from fedfusion_flwr import FedFusion, RunConfig, protocol
from fedfusion_flwr.federation.in_process_grid import InProcessGrid
from fedfusion_flwr.fusion import NormalizationStatistics
from fedfusion_flwr.models import DataShape, ModelError, build_model
from fedfusion_flwr.strategies import check_fits
from tests.runs import rows, run_in_process
from tests.support import Recorder

PROBE = {"statistics_source": "probe"}
SHAPE = DataShape((1, 8, 8), 3)


def check(model: nn.Module | None = None, **settings: Any) -> None:
    config = RunConfig(**settings)
    shape = SHAPE.input_shape, SHAPE.num_classes
    built = model or build_model(config.model, *shape, 0, normalization=config.normalization)
    check_fits(config, built, SHAPE.examples(2))


@pytest.mark.parametrize(
    "settings",
    [
        {},
        PROBE,
        PROBE | {"normalization": "group"},
        PROBE | {"normalization": "layer", "statistics_layers": "ends"},
        {"strategy": "fedavg", "normalization": "group"},
        PROBE | {"strategy": "fedavg", "normalization": "none"},
        {"local_normalization": "fused"},
    ],
)
def test_what_fits_passes(settings: dict[str, Any]) -> None:
    check(**settings)


def test_fed_gn_without_anything_to_normalize_warns(caplog: pytest.LogCaptureFixture) -> None:
    plain = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
    with caplog.at_level("WARNING", logger="flwr"):
        check(plain, strategy="fed-gn")
    assert "fed-gn is fedavg here" in caplog.text
    caplog.clear()
    check(strategy="fed-gn", normalization="group")
    assert not caplog.text


@pytest.mark.parametrize("normalization", ["group", "layer"])
def test_local_statistics_need_batchnorm(normalization: str) -> None:
    with pytest.raises(ModelError) as refusal:
        check(normalization=normalization)
    assert str(refusal.value) == (
        "strategy = 'fedfusion' needs normalization statistics, and model = 'lenet' with "
        f"normalization = '{normalization}' has no BatchNorm layer for statistics-source = 'local' "
        'to read; use statistics-source = "probe", normalization = "batch", another model or a '
        'strategy without statistics, such as "fedavg"'
    )


@pytest.mark.parametrize("source", ["local", "probe"])
def test_a_model_without_normalization_is_refused(source: str) -> None:
    with pytest.raises(ModelError, match=r"no normalization layer; use normalization = \"batch"):
        check(normalization="none", statistics_source=source)
    # A model that never had one: a remedy that would not help is not named.
    with pytest.raises(ModelError, match="has no normalization layer; use another model or"):
        check(nn.Sequential(nn.Flatten(), nn.Linear(64, 3)), statistics_source=source)


def test_a_model_that_cannot_be_probed_is_refused() -> None:
    model = nn.Sequential(nn.LayerNorm((1, 8, 8)), nn.Flatten(), nn.Linear(64, 3))
    with pytest.raises(ModelError, match=r"cannot be probed: .*only one channel axis"):
        check(model, statistics_source="probe")


@pytest.mark.parametrize("strategy", ["fedavg", "fedfusion"])
def test_fused_normalization_needs_batchnorm(strategy: str) -> None:
    settings = PROBE | {"normalization": "group"}
    with pytest.raises(ModelError, match="local-normalization = 'fused' needs running statistics"):
        check(strategy=strategy, local_normalization="fused", **settings)


def run_here(folder: Path, **config: Any) -> list[dict[str, Any]]:
    defaults = {"num-server-rounds": 2, "output-dir": str(folder / "run")}
    run_in_process({**defaults, **config})
    return rows(folder / "run")


def test_a_run_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"statistics-source = \"probe\""):
        run_here(tmp_path, normalization="group")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("normalization", ["group", "layer"])
def test_fedfusion_runs_on_probed_layers(tmp_path: Path, normalization: str) -> None:
    metrics = run_here(tmp_path, normalization=normalization, **{"statistics-source": "probe"})
    for row in metrics[1:]:
        assert (row["replies-valid"], row["fusion-fallback"]) == (10, 0)
        assert row["components-occupied"] > 1
    assert metrics[-1]["train-loss"] < metrics[1]["train-loss"]


@pytest.mark.parametrize("source", ["local", "probe"])
def test_fedavg_runs_without_any_normalization(tmp_path: Path, source: str) -> None:
    config = {"strategy": "fedavg", "normalization": "none", "statistics-source": source}
    metrics = run_here(tmp_path, **config)
    assert [row["replies-valid"] for row in metrics[1:]] == [10, 10]
    assert metrics[-1]["train-loss"] < metrics[1]["train-loss"]


def test_bfloat16_reaches_clients_and_server(tmp_path: Path) -> None:
    full = run_here(tmp_path / "a")[-1]
    half = run_here(tmp_path / "b", precision="bf16")[-1]
    for key in ("train-loss", "global-loss"):
        assert half[key] != full[key]
        assert half[key] == pytest.approx(full[key], rel=0.2)


def test_a_client_without_a_record_loses_its_reply_and_does_not_end_the_run() -> None:
    """GroupNorm has no statistics in the state dict: a client without a record has no weight."""
    model = nn.Sequential(nn.Linear(2, 4), nn.GroupNorm(2, 4), nn.Linear(4, 2))

    def answer(message: Message, context: Context) -> Message:
        partition = int(context.node_config["partition-id"])  # type: ignore[arg-type]
        received = message.content.array_records["arrays"]
        model.load_state_dict(protocol.state_from_record(received))
        content = RecordDict({"arrays": received})
        content["metrics"] = MetricRecord({"num-examples": 8, "train-loss": 1.0})
        if partition != 1:
            x = torch.randn(8, 2, generator=torch.Generator().manual_seed(partition)) + partition
            statistics = NormalizationStatistics.probe(model, [x])
            content["normalization"] = protocol.record_from_statistics(statistics)
        return Message(content, reply_to=message)

    recorder = Recorder()
    strategy = FedFusion(
        num_components=2, min_available_nodes=5, fraction_evaluate=0.0, callbacks=[recorder]
    )
    initial = protocol.record_from_state(model.state_dict())
    strategy.start(InProcessGrid(answer, 5), initial, 3)
    first, *later = recorder.reports[1:]
    assert first.metrics["fusion-fallback"] == 1
    for report in later:
        assert report.metrics["fusion-fallback"] == 0
        dropped = {row.client: row.dropped for row in report.clients if row.dropped}
        assert dropped == {1: "statistics"}
