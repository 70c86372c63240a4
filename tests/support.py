# SPDX-License-Identifier: Apache-2.0
"""A tiny federation: model, honest clients, a grid that tampers, and ways to spoil a reply."""

from __future__ import annotations

import io
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import Result
from torch import Tensor, nn

from fedfusion_flwr import protocol
from fedfusion_flwr.federation.in_process_grid import InProcessGrid
from fedfusion_flwr.federation.round import RoundReport
from fedfusion_flwr.federation.strategy import FederatedStrategy
from fedfusion_flwr.fusion import DistributionInference, NormalizationStatistics
from fedfusion_flwr.strategies import (
    IFCA,
    FedAvg,
    FedAvgM,
    FedBN,
    FedCluster,
    FedClusterCycling,
    FedFusion,
    FedGroup,
    FedProx,
    FeSEM,
)

State = dict[str, Tensor]
Spoil = Callable[[Message], None]
Tamper = Callable[[list[Message]], list[Message]]

WEIGHT = "fc.weight"
MEAN = "norm.running_mean"
VARIANCE = "norm.running_var"
COUNTER = "norm.num_batches_tracked"


def tiny_model() -> nn.Sequential:
    """Twenty parameters and one BatchNorm layer; the same values at every call."""
    model = nn.Sequential(
        OrderedDict(fc=nn.Linear(2, 2, bias=False), norm=nn.BatchNorm1d(2), out=nn.Linear(2, 2))
    )
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model


def initial_arrays() -> ArrayRecord:
    return protocol.record_from_state(tiny_model().state_dict())


def untrained_state(number: int) -> State:
    """Different models for different numbers, for strategies that start from several."""
    state = tiny_model().state_dict()
    return {k: v + 0.1 * number if k == WEIGHT else v for k, v in state.items()}


def honest_state(received: Mapping[str, Tensor], partition: int) -> State:
    """What partition sends back: every float moved by its own offset, counters by one."""
    step = 0.01 * (partition + 1)
    return {
        key: value + (step if value.is_floating_point() else 1) for key, value in received.items()
    }


def choose(
    received: State, settings: Mapping[str, Any], partition: int
) -> tuple[State, dict[str, int]]:
    """Of several models, as IFCA sends them, the one of the partition's number."""
    if "num-models" not in settings:
        return received, {}
    models = list(protocol.unpack_states(received).values())
    chosen = partition % len(models)
    examples = 10 * (partition + 1) * len(models)
    return models[chosen], {"cluster": chosen, "forward-examples": examples}


@dataclass
class FakeClient:
    """Answers like `fedfusion_flwr.app.client`, without training; some partitions spoil replies.

    ``echo`` and ``normalization`` choose whether those records are sent: without both, it is a
    client that knows nothing of this package. ``spoil_rounds`` limits the rounds that are spoiled.
    """

    spoil: Spoil | None = None
    hostile: tuple[int, ...] = ()
    echo: bool = True
    normalization: bool = True
    spoil_rounds: tuple[int, ...] | None = None
    seen: list[tuple[str, int, int]] = field(default_factory=list)

    def __call__(self, message: Message, context: Context) -> Message:
        partition = int(context.node_config["partition-id"])  # type: ignore[arg-type]
        settings = message.content.config_records["config"]
        server_round = settings["server-round"]
        assert isinstance(server_round, int)
        self.seen.append((message.metadata.message_type, server_round, partition))
        content = RecordDict()
        if message.metadata.message_type == "train":
            received = protocol.state_from_record(message.content.array_records["arrays"])
            received, choice = choose(received, settings, partition)
            state = honest_state(received, partition)
            content["arrays"] = protocol.record_from_state(state)
            if self.normalization:
                statistics = NormalizationStatistics.from_state_dict(state)
                content["normalization"] = protocol.record_from_statistics(statistics)
            examples = 10 * (partition + 1)
            metrics: dict[str, Any] = {"num-examples": examples, "train-loss": 1.0 + partition}
            metrics |= choice | {"gradient-steps": settings.get("max-steps", 7)}
            if settings.get("class-counts"):
                metrics["class-counts"] = [examples - partition, partition]
        else:
            metrics = {"num-examples": partition + 1, "personalized-accuracy": 0.1 * partition}
        content["metrics"] = MetricRecord(metrics)
        if self.echo:
            content["client"] = ConfigRecord(
                {"server-round": server_round, "partition-id": partition}
            )
        reply = Message(content, reply_to=message)
        wanted = self.spoil_rounds is None or server_round in self.spoil_rounds
        if self.spoil is not None and wanted and partition in self.hostile:
            self.spoil(reply)
        return reply


class TamperingGrid(InProcessGrid):
    """Changes the list of replies on its way to the server: losses, repeats, strangers."""

    tamper: Tamper | None = None

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        replies = list(super().send_and_receive(messages, timeout=timeout))
        return self.tamper(replies) if self.tamper and replies else replies


@dataclass
class Recorder:
    """A callback that keeps every report."""

    reports: list[RoundReport] = field(default_factory=list)

    def on_round_end(self, report: RoundReport) -> None:
        self.reports.append(report)


@dataclass
class After:
    """A callback that acts after given rounds."""

    actions: Mapping[int, Callable[[], object]]

    def on_round_end(self, report: RoundReport) -> None:
        self.actions.get(report.server_round, lambda: None)()


@dataclass(frozen=True)
class Outcome:
    """What a small run left."""

    result: Result
    strategy: FederatedStrategy
    reports: list[RoundReport]

    @property
    def state(self) -> State:
        return protocol.state_from_record(self.result.arrays)

    def train_metrics(self, server_round: int) -> dict[str, float]:
        return dict(self.result.train_metrics_clientapp[server_round])  # type: ignore[arg-type]


TINY: dict[str, tuple[type[FederatedStrategy], dict[str, Any]]] = {
    "fedavg": (FedAvg, {}),
    "fedavgm": (FedAvgM, {"server_momentum": 0.5, "average_decay": 0.5}),
    "fedprox": (FedProx, {}),
    "fed-gn": (FedAvg, {}),
    "fedbn": (FedBN, {}),
    "fesem": (FeSEM, {"num_clusters": 2}),
    "ifca": (IFCA, {"num_clusters": 2, "warmup_rounds": 1}),
    "fedcluster": (FedCluster, {"num_clusters": 2, "cluster_round": 1}),
    "fedcluster-cycling": (FedClusterCycling, {"num_clusters": 1}),
    "fedgroup": (FedGroup, {"num_clusters": 2, "pretrain_steps": 2}),
}
"""Every strategy in small, except FedFusion, which `make_strategy` gives a short inference."""


def make_strategy(
    name: str, recorder: Recorder | None = None, **settings: Any
) -> FederatedStrategy:
    """A strategy for a tiny federation; FedFusion with a short inference."""
    settings = {"min_train_nodes": 1, "min_available_nodes": 1, "fraction_evaluate": 0} | settings
    settings["callbacks"] = [recorder] if recorder else []
    if name == "fedfusion":
        inference = DistributionInference(3, 0, hidden=8, steps=4, refit_steps=2)
        return FedFusion(**{"num_components": 3, "inference": inference} | settings)
    strategy, tiny = TINY[name]
    if "initial_state" in strategy.__dataclass_fields__:
        settings.setdefault("initial_state", untrained_state)
    return strategy(**tiny | settings)


def run_federation(
    name: str,
    client: Callable[[Message, Context], Message],
    num_clients: int,
    *,
    rounds: int = 2,
    grid: InProcessGrid | None = None,
    tamper: Tamper | None = None,
    evaluate_fn: Callable[[int, ArrayRecord], MetricRecord | None] | None = None,
    **settings: Any,
) -> Outcome:
    """Run a few rounds in this process."""
    recorder = Recorder()
    strategy = make_strategy(name, recorder, **settings)
    if grid is None:
        grid = TamperingGrid(client, num_clients)
        grid.tamper = tamper
    result = strategy.start(grid, initial_arrays(), num_rounds=rounds, evaluate_fn=evaluate_fn)
    return Outcome(result, strategy, recorder.reports)


def assert_identical(state: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> None:
    """Bit for bit: keys, types, shapes and values."""
    assert list(state) == list(other)
    for key, value in state.items():
        assert value.dtype == other[key].dtype, key
        assert torch.equal(value, other[key]), key


def arrays_of(reply: Message) -> ArrayRecord:
    return reply.content.array_records["arrays"]


def replace_value(key: str, value: Any, dtype: str | None = None, record: str = "arrays") -> Spoil:
    """Send another array under ``key``."""

    def spoil(reply: Message) -> None:
        reply.content.array_records[record][key] = Array(np.array(value, dtype=dtype))

    return spoil


def edit_value(key: str, edit: Callable[[np.ndarray], Any], record: str = "arrays") -> Spoil:
    """Send ``edit(array)`` under ``key``."""

    def spoil(reply: Message) -> None:
        arrays = reply.content.array_records[record]
        arrays[key] = Array(np.asarray(edit(arrays[key].numpy())))

    return spoil


def replace_payload(key: str, data: bytes, stype: str = "numpy.ndarray") -> Spoil:
    """Send raw bytes under labels that look right."""

    def spoil(reply: Message) -> None:
        arrays_of(reply)[key] = Array(dtype="float32", shape=(2, 2), stype=stype, data=data)

    return spoil


def replace_metric(key: str, value: Any) -> Spoil:
    """Send another metric, past Flower's own type check."""

    def spoil(reply: Message) -> None:
        reply.content.metric_records["metrics"].__dict__["_data"][key] = value

    return spoil


def npy_payload(header: str, data: bytes = b"") -> bytes:
    """A version 1.0 .npy file with the given header."""
    text = header.encode("latin1")
    text += b" " * (-(len(text) + 11) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + data


def saved(array: np.ndarray, *, allow_pickle: bool = False) -> bytes:
    """The bytes of ``np.save``."""
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=allow_pickle)
    return buffer.getvalue()
