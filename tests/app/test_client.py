# SPDX-License-Identifier: Apache-2.0
"""The ClientApp, called directly."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from flwr.app import ArrayRecord, Message

from fedfusion_flwr import RunConfig, protocol
from fedfusion_flwr.app.training import evaluate
from fedfusion_flwr.data import LocalData, local_data
from fedfusion_flwr.fusion import NormalizationStatistics
from fedfusion_flwr.models import build_model
from tests.runs import ask_client, state_of, statistics_of

BASE: dict[str, Any] = {"partition": "components"}


def initial(model: str = "lenet") -> ArrayRecord:
    return protocol.record_from_state(build_model(model, (1, 28, 28), 10, seed=0).state_dict())


def ask(
    kind: str,
    *,
    partition: int = 0,
    server_round: int = 1,
    arrays: ArrayRecord | None = None,
    node: dict[str, Any] | None = None,
    settings: dict[str, Any] | None = None,
    **config: Any,
) -> Message:
    """One message to one client of ten."""
    node = {"partition-id": partition, "num-partitions": 10} if node is None else node
    sent = {"server-round": server_round, **(settings or {})}
    return ask_client({**BASE, **config}, node, arrays or initial(), kind, sent)


def _loss(state: dict[str, torch.Tensor], data: LocalData) -> float:
    model = build_model("lenet", (1, 28, 28), 10, seed=0)
    model.load_state_dict(state)
    return evaluate(model, data.x, data.y)[0]


def test_train_returns_model_statistics_and_metrics() -> None:
    reply = ask("train")
    state = state_of(reply)
    sent = protocol.state_from_record(initial())
    assert state.keys() == sent.keys()
    assert not torch.equal(state["head.0.weight"], sent["head.0.weight"])
    config = RunConfig.from_run_config(BASE)
    metrics = reply.content.metric_records["metrics"]
    data = local_data(config, 0)
    assert metrics["num-examples"] == len(data.x)
    assert _loss(state, data) < _loss(sent, data)
    assert metrics["train-seconds"] > 0  # type: ignore[operator]
    assert dict(reply.content.config_records["client"]) == {"server-round": 1, "partition-id": 0}


def test_local_statistics_are_those_of_the_trained_model() -> None:
    reply = ask("train", **{"statistics-source": "local"})
    read = NormalizationStatistics.from_state_dict(state_of(reply))
    assert torch.equal(statistics_of(reply).vector(), read.vector())


def test_probe_statistics_are_moments_under_the_received_model() -> None:
    """Train and query agree, and both equal the moments of the first convolution's outputs."""
    probe = statistics_of(ask("query", partition=2))
    trained = ask("train", partition=2, **{"statistics-source": "probe"})
    assert torch.equal(probe.vector(), statistics_of(trained).vector())

    model = build_model("lenet", (1, 28, 28), 10, seed=0).eval()
    x = local_data(RunConfig.from_run_config(BASE), 2).x
    with torch.no_grad():
        first = model.features[0][0](x)  # type: ignore[index]
    torch.testing.assert_close(probe.mean[:16], first.mean((0, 2, 3)), rtol=1e-4, atol=1e-5)
    spread = (first.var((0, 2, 3), correction=0) + 1e-5).sqrt()
    torch.testing.assert_close(probe.std[:16], spread, rtol=1e-4, atol=1e-5)


def test_frozen_layers_and_class_counts() -> None:
    sent = protocol.state_from_record(initial())
    frozen = [key for key in sent if key.startswith("features.")]
    reply = ask("train", settings={"frozen": frozen, "class-counts": True})
    state = state_of(reply)
    moved = {key for key in sent if not torch.equal(sent[key], state[key])}
    assert moved == {"head.0.weight", "head.0.bias", "head.2.weight", "head.2.bias"}
    labels = local_data(RunConfig.from_run_config(BASE), 0).y.tolist()
    counts = reply.content.metric_records["metrics"]["class-counts"]
    assert counts == [labels.count(c) for c in range(10)]
    assert "class-counts" not in ask("train").content.metric_records["metrics"]


def test_a_model_of_other_widths_is_trained_at_those() -> None:
    sent = protocol.state_from_record(initial())
    narrow = {**sent, "head.0.weight": sent["head.0.weight"][:7], "head.0.bias": torch.zeros(7)}
    narrow["head.2.weight"] = sent["head.2.weight"][:, :7]
    reply = ask("train", arrays=protocol.record_from_state(narrow))
    state = state_of(reply)
    assert {k: v.shape for k, v in state.items()} == {k: v.shape for k, v in narrow.items()}
    # The model that the process keeps has not become narrow.
    assert not ask("train").has_error()


def test_evaluate_uses_the_validation_part() -> None:
    metrics = ask("evaluate").content.metric_records["metrics"]
    held_out = local_data(RunConfig.from_run_config(BASE), 0).x_validation
    assert metrics["num-examples"] == len(held_out)
    assert 0 <= metrics["personalized-accuracy"] <= 1  # type: ignore[operator]


def test_reply_depends_on_seed_partition_and_round_alone() -> None:
    def arrays(**settings: Any) -> bytes:
        record = ask("train", **settings).content.array_records["arrays"]
        return b"".join(array.data for array in record.values())

    first = arrays(partition=1)
    arrays(partition=3)  # another client in between changes nothing
    assert arrays(partition=1) == first
    assert arrays(partition=1, server_round=2) != first
    assert arrays(partition=1, seed=1) != first


def test_fused_normalization_begins_in_its_round() -> None:
    """From then on, running statistics are measured after training and count no batches."""
    key = "features.0.1.num_batches_tracked"
    for server_round, counts in ((2, True), (5, False)):
        reply = ask("train", server_round=server_round, **{"local-normalization": "fused"})
        assert bool(state_of(reply)[key] > 0) is counts


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"learning-rate": 1e6}, "lower learning-rate"),
        ({"node": {"partition-id": "0"}}, "partition-id = '0' is not allowed"),
        ({"node": {"data-root": 3}}, "data-root = 3 is not allowed"),
        ({"node": {"partition-id": 0, "num-partitions": 2}}, "num-clients = 10"),
        ({"node": {"partition-id": 12, "num-partitions": 10}}, "from 0 to 9"),
        ({"learning_rate": 0.1}, "did you mean 'learning-rate'"),
    ],
)
def test_what_a_user_can_fix_is_an_error_reply_of_one_sentence(
    settings: dict[str, Any], sentence: str
) -> None:
    reply = ask("train", **settings)
    assert reply.has_error()
    assert sentence in reply.error.reason
    assert "\n" not in reply.error.reason


@pytest.mark.slow
def test_compilation_without_a_compiler_is_an_error_reply() -> None:
    from torch._inductor import config

    missing = {"cpp.cxx": (None, "no-such-compiler"), "force_disable_caches": True}
    with config.patch(missing):
        reason = ask("train", compile=True).error.reason
    assert re.match(r"compile = true, but .*; install .* or use compile = false", reason)
    assert "\n" not in reason
    assert not ask("evaluate", compile=True).has_error()
    torch.compiler.reset()


def test_evaluate_without_validation_part_says_so() -> None:
    reply = ask("evaluate", **{"validation-fraction": 0.0, "fraction-evaluate": 0.0})
    assert "raise validation-fraction" in reply.error.reason


def test_resnet18_trains_and_reports_its_4800_channels() -> None:
    reply = ask("query", arrays=initial("resnet18"), model="resnet18", **{"train-examples": 200})
    assert statistics_of(reply).mean.shape == (4800,)
