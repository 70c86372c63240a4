# SPDX-License-Identifier: Apache-2.0
"""Checks each reply by itself, against the model that was sent and never against other replies.

A bad reply is dropped with a named reason; the round goes on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from flwr.app import Message, RecordDict
from flwr.common.constant import SUPERLINK_NODE_ID
from torch import Tensor

from fedfusion_flwr import protocol
from fedfusion_flwr.federation.bounds import UpdateBound, nonfinite, square_sums
from fedfusion_flwr.federation.options import Plausibility
from fedfusion_flwr.federation.round import ClientRow
from fedfusion_flwr.fusion import NormalizationStatistics, example_weights
from fedfusion_flwr.fusion.statistics import batchnorm_prefixes

MAX_STATISTIC = 1e6
"""Bound on |mean|, variance, shift and scale of a normalization layer."""

MAX_BATCHES = 2**31
"""Most batches that a client can have tracked in one round; keeps counters from overflowing."""

MAX_METRICS = 100_000
"""Most values plus characters of names in a reply's metrics, which are all written to disk."""

Expected = Callable[[int, Mapping[str, float]], Mapping[str, Tensor]]


class BadReply(Exception):
    """A reply that does not count; ``reason`` is a slug for the metrics."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(_first_line(detail))
        self.reason = reason


@dataclass(frozen=True)
class ClientReply:
    """A reply that passed every check. ``state`` shares memory with the message.

    ``metrics`` are the numbers that the client reports, ``lists`` the lists of numbers; ``detail``
    says what a defence did to it.
    """

    client: int
    node: int
    num_examples: int
    metrics: dict[str, float]
    state: dict[str, Tensor] = field(default_factory=dict)
    statistics: NormalizationStatistics | None = None
    partition: int | None = None
    lists: dict[str, list[float]] = field(default_factory=dict)
    detail: str | None = None

    def row(
        self,
        weight: float = 0.0,
        assignment: list[float] | None = None,
        cluster: int | None = None,
    ) -> ClientRow:
        """The reply as a row of the round's report."""
        return ClientRow(
            client=self.client,
            node=self.node,
            partition=self.partition,
            num_examples=self.num_examples,
            weight=weight,
            assignment=assignment,
            cluster=cluster,
            metrics=self.metrics,
            detail=self.detail,
        )


def weights_by_examples(replies: Sequence[ClientReply]) -> Tensor:
    """p_k = n_k / sum_j n_j, shape (K,), float64."""
    return example_weights(torch.tensor([reply.num_examples for reply in replies]))


@dataclass
class ReplyJudge:
    """Checks the replies of one phase of one round.

    Parameters
    ----------
    server_round : int
        The round that a reply must name, if it names one.
    sampled : Mapping[int, int]
        Client id by node id, of the clients that were asked; any other node is a stranger.
    expected : Callable[[int, Mapping[str, float]], Mapping[str, Tensor]] or None
        Returns the model a client trained from, given its id and metrics: a train reply must match
        its keys, shapes and types. None if replies hold no model.
    check : Callable[[ClientReply], None]
        Raises `BadReply` for what the strategy does not accept.
    num_channels : int or None
        Required length of a ``normalization`` vector, if known. If it is known although the model
        has no running statistics, every reply needs the record.
    arrays_key, examples_key : str
        Names of the ArrayRecord and of the example count.
    plausibility : Plausibility
        Bounds on the example count and on the step away from the model that was sent.
    """

    server_round: int
    sampled: Mapping[int, int]
    expected: Expected | None
    check: Callable[[ClientReply], None] = lambda _: None
    num_channels: int | None = None
    arrays_key: str = protocol.ARRAYS
    examples_key: str = protocol.NUM_EXAMPLES
    plausibility: Plausibility = field(default_factory=Plausibility)
    _bounds: dict[int, UpdateBound] = field(default_factory=dict, init=False)

    def judge(self, replies: Iterable[Message]) -> tuple[list[ClientReply], list[ClientRow]]:
        """Split replies into good ones, sorted by client id, and rows of the dropped ones.

        Sampled clients that never answered are among the rows, as ``missing``.
        """
        good: dict[int, ClientReply] = {}
        bad: list[ClientRow] = []
        seen: set[int] = set()
        for message in replies:
            node = message.metadata.src_node_id
            if node == SUPERLINK_NODE_ID and message.has_error():
                continue  # how Flower reports a lost node; it is counted as missing below
            client = self.sampled.get(node)
            try:
                if client is None:
                    raise BadReply("stranger", "this node was not asked in this round")
                if node in seen:
                    raise BadReply("duplicate", "this node has already answered in this round")
                seen.add(node)
                reply = self._check(message, client)
                self.check(reply)
                good[client] = reply
            except BadReply as problem:
                bad.append(ClientRow(client, node, dropped=problem.reason, detail=str(problem)))
            except Exception as problem:  # noqa: BLE001 - no reply may end the run
                detail = _first_line(f"{type(problem).__name__}: {problem}")
                bad.append(ClientRow(client, node, dropped="structure", detail=detail))
        for node, client in self.sampled.items():
            if node not in seen:
                bad.append(ClientRow(client, node, dropped="missing", detail="no reply in time"))
        bad.sort(key=lambda row: (row.client is None, row.client, row.node))
        return [good[client] for client in sorted(good)], bad

    def _check(self, message: Message, client: int) -> ClientReply:
        if message.has_error():
            raise BadReply("error", message.error.reason or "no reason given")
        content = message.content
        partition = self._check_identity(content)
        metrics = self._metrics(content)
        examples = self._examples(metrics.pop(self.examples_key, None))
        numbers = {k: float(v) for k, v in metrics.items() if isinstance(v, int | float)}
        state: dict[str, Tensor] = {}
        statistics = None
        if self.expected is not None:
            state = self._model(content, self.expected(client, numbers))
            statistics = self._statistics(content, state)
        lists = {k: v for k, v in metrics.items() if isinstance(v, list)}
        node = message.metadata.src_node_id
        return ClientReply(client, node, examples, numbers, state, statistics, partition, lists)

    def _check_identity(self, content: RecordDict) -> int | None:
        identity = content.config_records.get(protocol.CLIENT)
        if identity is None:
            return None
        echoed = identity.get(protocol.SERVER_ROUND)
        if echoed != self.server_round:
            raise BadReply("stale", f"answers round {echoed!r}, not round {self.server_round}")
        partition = identity.get(protocol.PARTITION_ID)
        return partition if type(partition) is int else None

    def _metrics(self, content: RecordDict) -> dict[str, object]:
        records = content.metric_records
        if len(records) != 1:
            raise BadReply("structure", f"holds {len(records)} MetricRecords instead of one")
        metrics = dict(next(iter(records.values())))
        size = sum(len(k) + (len(v) if isinstance(v, list) else 1) for k, v in metrics.items())
        if size > MAX_METRICS:
            raise BadReply("size", f"its metrics hold {size} values and characters of names")
        for key, value in metrics.items():
            values = value if isinstance(value, list) else [value]
            if not all(math.isfinite(v) for v in values):
                raise BadReply("nonfinite", f"metric '{key}' is not finite")
        return dict(metrics)

    def _examples(self, value: object) -> int:
        if value is None:
            raise BadReply("examples", f"metric '{self.examples_key}' is missing")
        if not isinstance(value, int | float) or isinstance(value, bool) or value != int(value):
            raise BadReply("examples", f"{self.examples_key} = {value!r} is not a whole number")
        count = int(value)
        if not 1 <= count <= self.plausibility.max_examples:
            raise BadReply(
                "examples",
                f"{self.examples_key} = {count} is not from 1 to {self.plausibility.max_examples}",
            )
        return count

    def _model(self, content: RecordDict, expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
        others = [k for k in content.array_records if k != protocol.NORMALIZATION]
        if others != [self.arrays_key] and len(others) != 1:
            raise BadReply("structure", f"holds ArrayRecords {others}, not just one model")
        record = content.array_records[others[0]]
        if record.keys() != expected.keys():
            odd = sorted(record.keys() ^ expected.keys())
            raise BadReply("structure", f"its keys differ from the model's: {odd[:3]}")
        state: dict[str, Tensor] = {}
        for key, wanted in expected.items():
            if len(record[key].data) > wanted.nbytes + protocol.NPY_OVERHEAD:
                raise BadReply("size", f"'{key}' holds {len(record[key].data)} bytes")
            try:
                view = protocol.array_view(record[key])
            except protocol.ProtocolError as problem:
                raise BadReply("structure", f"'{key}': {problem}") from problem
            if view.shape != tuple(wanted.shape):
                raise BadReply("shape", f"'{key}' is {view.shape}, not {tuple(wanted.shape)}")
            if view.dtype != wanted.numpy().dtype:
                raise BadReply("dtype", f"'{key}' is {view.dtype}, not {wanted.numpy().dtype}")
            state[key] = protocol.tensor_view(view)
        sums = square_sums(state)
        unusable = nonfinite(state, sums)
        if unusable:
            raise BadReply("nonfinite", f"'{unusable}' is not finite")
        self._check_normalization(state, expected)
        leap = self._bound(expected).leap(state, sums)
        if leap:
            raise BadReply("update", leap)
        return state

    def _bound(self, expected: Mapping[str, Tensor]) -> UpdateBound:
        """The bound around a model that was sent, made once for all its receivers."""
        bound = self._bounds.get(id(expected))
        if bound is None or bound.current is not expected:
            bound = self._bounds[id(expected)] = UpdateBound(
                expected, self.plausibility.max_update_ratio
            )
        return bound

    def _check_normalization(
        self, state: Mapping[str, Tensor], expected: Mapping[str, Tensor]
    ) -> None:
        for key, value in state.items():
            name = key.rpartition(".")[2]
            if name == "running_var" and bool((value < 0).any()):
                raise BadReply("statistics", f"'{key}' is negative")
            if name == "num_batches_tracked":
                low, high = expected[key], expected[key] + MAX_BATCHES
                if not bool(((low <= value) & (value <= high)).all()):
                    raise BadReply("statistics", f"'{key}' = {value.tolist()} after {low.tolist()}")
            if name in ("running_mean", "running_var") and value.numel():
                prefix = key.removesuffix(name)
                for part in (name, "weight", "bias"):
                    tensor = state.get(prefix + part)
                    if tensor is not None and float(tensor.abs().max()) > MAX_STATISTIC:
                        raise BadReply("statistics", f"'{prefix}{part}' exceeds {MAX_STATISTIC:g}")

    def _statistics(
        self, content: RecordDict, state: Mapping[str, Tensor]
    ) -> NormalizationStatistics | None:
        record = content.array_records.get(protocol.NORMALIZATION)
        if record is None:
            if self.num_channels is not None and not batchnorm_prefixes(state):
                raise BadReply("statistics", "no normalization record, which this model needs")
            return None
        # A model has no more channels than values: a bound where their number is not known.
        channels = self.num_channels or sum(value.numel() for value in state.values())
        allowed = 4 * channels + protocol.NPY_OVERHEAD
        if any(len(array.data) > allowed for array in record.values()):
            raise BadReply("size", "its normalization record is too large")
        try:
            statistics = protocol.statistics_from_record(record)
        except protocol.ProtocolError as problem:
            raise BadReply("statistics", f"normalization record: {problem}") from problem
        length = len(statistics.mean)
        if self.num_channels is not None and length != self.num_channels:
            raise BadReply("statistics", f"{length} channels instead of {self.num_channels}")
        if float(statistics.vector().abs().max()) > MAX_STATISTIC:
            raise BadReply("statistics", f"normalization record exceeds {MAX_STATISTIC:g}")
        return statistics


def _first_line(text: str) -> str:
    """The first line of a text, for the log: without characters that control a terminal."""
    lines = text[:10_000].strip().splitlines()
    line = lines[0][:300] if lines else "no reason given"
    return "".join(letter if letter.isprintable() else "?" for letter in line)
