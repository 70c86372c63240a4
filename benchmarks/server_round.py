# SPDX-License-Identifier: Apache-2.0
"""What does the server's part of a round cost: check, infer, fuse, step?

    python benchmarks/server_round.py [CASE ...] [--table]

``aggregate_train`` of FedFusion on K replies from its second round on, against

- a plain weighted sum of the same models, decoded without copies, in float32 and in place: one
  reading of the replies, nothing checked; the memory's speed;
- ``aggregate_train`` of Flower's own FedAvg.

All three use the machine's default number of threads. Memory is what FedFusion's call adds at its
peak to that of the process, replies and all, in models.

FedFusion's fastest call is taken apart: checks of the replies (decoding, validity, bound on the
update), inference, fusion (the weighted sum), and the rest (server step, served average, records).
The floor is two readings of the replies and that inference: that every value is finite and that the
update is bounded must be known before the weights are, and the sum reads the replies again. A
reading is the faster of a bare dot product of every tensor with itself and the plain sum.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAvg

from benchmarks.measuring import Columns, PeakMemory, command_line, seconds
from fedfusion_flwr import protocol
from fedfusion_flwr.experiments.rows import Row
from fedfusion_flwr.federation.in_process_grid import InProcessGrid
from fedfusion_flwr.federation.replies import ClientReply
from fedfusion_flwr.federation.round import State, Update
from fedfusion_flwr.models import build_model
from fedfusion_flwr.strategies import FedFusion

RESULTS = Path(__file__).parent / "results" / "server_round.jsonl"
GROUPS = 5
ROUNDS = 4
IMAGES = {"lenet": (1, 28, 28), "resnet18": (3, 32, 32)}


class TakenApart(FedFusion):
    """FedFusion that notes the seconds of the parts of its last ``aggregate_train``."""

    parts: dict[str, float]

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        self.parts = {}
        started = perf_counter()
        result = super().aggregate_train(server_round, replies)
        self.parts["rest"] = perf_counter() - started - sum(self.parts.values())
        return result

    def _judge_replies(self, *arguments: Any, **options: Any) -> Any:
        return self._timed("checks", super()._judge_replies, *arguments, **options)

    def advance(self, replies: list[ClientReply]) -> Update:
        update = super().advance(replies)
        self.parts |= {"inference": update.seconds["infer"]}
        return update

    def fuse(self, states: Iterable[Mapping[str, torch.Tensor]], weights: torch.Tensor) -> State:
        fused: State = self._timed("fusion", super().fuse, states, weights)
        return fused

    def _timed(self, part: str, work: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        started = perf_counter()
        result = work(*arguments, **options)
        self.parts[part] = perf_counter() - started
        return result


def replies(state: State, clients: int) -> list[RecordDict]:
    """Models near ``state``, whose running means tell five groups apart."""
    generator = torch.Generator().manual_seed(0)
    offsets = {k: torch.randn(GROUPS, *v.shape, generator=generator) for k, v in state.items()}
    contents = []
    for client in range(clients):
        model: State = {}
        for key, value in state.items():
            if not value.is_floating_point():
                model[key] = value + 1
                continue
            noise = torch.rand(value.shape, generator=generator) - 0.5
            model[key] = value + 0.01 * noise
            if key.endswith("running_mean"):
                model[key] += offsets[key][client % GROUPS]
        metrics = MetricRecord({protocol.NUM_EXAMPLES: 100})
        contents.append(
            RecordDict({"arrays": protocol.record_from_state(model), "metrics": metrics})
        )
    return contents


def plain_sum(state: State, contents: list[RecordDict]) -> State:
    total = {k: torch.zeros_like(v) for k, v in state.items() if v.is_floating_point()}
    for content in contents:
        arrays = content.array_records["arrays"]
        for key, value in total.items():
            term = protocol.tensor_view(protocol.array_view(arrays[key]))
            value.add_(term, alpha=1 / len(contents))
    return total


def reading(state: State, contents: list[RecordDict]) -> list[float]:
    """Sums of squares: every byte of the replies once, and nothing written."""
    keys = [key for key, value in state.items() if value.is_floating_point()]
    sums = []
    for content in contents:
        arrays = content.array_records["arrays"]
        for key in keys:
            flat = protocol.tensor_view(protocol.array_view(arrays[key])).reshape(-1)
            sums.append(float(torch.dot(flat, flat)))
    return sums


def measure(model: str, clients: int) -> Row:
    """One case; seconds are the least over the rounds after the first."""
    state = build_model(model, IMAGES[model], 10, seed=0).state_dict()
    contents = replies(state, clients)

    def answer(message: Message, context: Context) -> Message:
        partition = context.node_config["partition-id"]
        assert isinstance(partition, int)
        return Message(contents[partition], reply_to=message)

    grid = InProcessGrid(answer, clients)
    sizes: dict[str, Any] = {"fraction_evaluate": 0.0, "min_train_nodes": clients}
    fedfusion = TakenApart(**sizes, server_momentum=0.5, average_decay=0.8)
    strategies = {
        "fedfusion": fedfusion,
        "flower-fedavg": FedAvg(**sizes, min_available_nodes=clients),
    }
    arrays = protocol.record_from_state(state)
    bare: dict[str, Callable[[], object]] = {
        "reading": functools.partial(reading, state, contents),
        "plain-sum": functools.partial(plain_sum, state, contents),
    }
    spent: dict[str, list[float]] = {name: [] for name in (*bare, *strategies)}
    parts: list[dict[str, float]] = []

    def aggregate(name: str, server_round: int) -> Callable[[], object]:
        asked = strategies[name].configure_train(server_round, arrays, ConfigRecord(), grid)
        answers = list(grid.send_and_receive(asked))
        return functools.partial(strategies[name].aggregate_train, server_round, answers)

    for server_round in range(1, ROUNDS + 1):
        for name, work in bare.items():
            spent[name].append(seconds(work))
        for name in strategies:
            spent[name].append(seconds(aggregate(name, server_round)))
        parts.append(fedfusion.parts)
    work = aggregate("fedfusion", ROUNDS + 1)
    with PeakMemory() as peak:
        work()
    size = sum(value.nbytes for value in state.values())
    least = {name: min(values[1:]) for name, values in spent.items()}
    fastest = parts[spent["fedfusion"].index(least["fedfusion"], 1)]
    return {
        "clients": clients,
        "model-bytes": size,
        "seconds": least,
        "first-round-seconds": spent["fedfusion"][0],
        "parts": fastest,
        "floor-seconds": 2 * min(least[name] for name in bare) + fastest["inference"],
        "extra-models": peak.grown / size,
        "threads": torch.get_num_threads(),
    }


CASES = {
    f"{model} x {clients}": functools.partial(measure, model, clients)
    for model, clients in (
        ("lenet", 10),
        ("lenet", 100),
        ("lenet", 1000),
        ("resnet18", 10),
        ("resnet18", 100),
    )
}


def _ratio(row: Row, other: str) -> str:
    return f"{row['seconds']['fedfusion'] / row['seconds'][other]:.2f}"


def _part(name: str) -> Callable[[Row], str]:
    def part(row: Row) -> str:
        # Rows of commit 85dc80b tell of the inference alone, and of no floor.
        parts = row.get("parts") or {"inference": row["infer-seconds"]}
        return f"{parts[name]:.3f}" if name in parts else "-"

    return part


def _floor(row: Row) -> str:
    return f"{row['floor-seconds']:.3f}" if "floor-seconds" in row else "-"


def _to_floor(row: Row) -> str:
    if "floor-seconds" not in row:
        return "-"
    return f"{row['seconds']['fedfusion'] / row['floor-seconds']:.2f}"


COLUMNS: Columns = {
    "FedFusion, s": lambda row: f"{row['seconds']['fedfusion']:.3f}",
    "checks": _part("checks"),
    "inference": _part("inference"),
    "fusion": _part("fusion"),
    "rest": _part("rest"),
    "floor, s": _floor,
    "to the floor": _to_floor,
    "to a plain sum": lambda row: _ratio(row, "plain-sum"),
    "to Flower's FedAvg": lambda row: _ratio(row, "flower-fedavg"),
    "extra memory, models": lambda row: f"{row['extra-models']:.1f}",
}

if __name__ == "__main__":
    command_line(__doc__ or "", RESULTS, CASES, COLUMNS)
