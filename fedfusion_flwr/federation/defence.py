# SPDX-License-Identifier: Apache-2.0
"""Limits on well-formed replies, judged against the round's other replies.

In this order: clients with outlying normalization statistics are dropped, example counts far above
the median are cut, and long updates are clipped. Every drop, cut and clip is logged, counted in the
round's metrics and noted in the client's row.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from logging import INFO, WARNING
from typing import Any, Self

import numpy as np
from flwr.common.logger import log
from torch import Tensor

from fedfusion_flwr.config import RunConfig
from fedfusion_flwr.config_rules import FRACTION, ZERO_OR_RATIO, at_least, checked
from fedfusion_flwr.federation.bounds import squared_distance
from fedfusion_flwr.federation.options import Options
from fedfusion_flwr.federation.outliers import (
    Moments,
    cap_counts,
    clip_update,
    moments_of,
    next_bound,
    outlier_scores,
)
from fedfusion_flwr.federation.replies import ClientReply, Expected
from fedfusion_flwr.federation.round import ClientRow, RoundReport

OUTLIER = "outlier"
OUTLIER_SCORE = "outlier-score"
UPDATE_NORM = "update-norm"
CLIP_BOUND = "clip-bound"
FEWEST_TO_JUDGE = 4
"""With fewer clients nobody is dropped: among two or three, who is the outlier?"""

MAX_CLIENT_WEIGHT = 0.2
"""The preset's ``max-client-weight``, where the run config sets no limit."""

Sent = Mapping[int, Mapping[str, Tensor]]
"""What each client trained from."""


@dataclass(frozen=True, kw_only=True)
class Defence(Options):
    """The ``robust`` preset; works for every strategy here.

    Parameters
    ----------
    outlier_threshold : float
        Drop a client if its statistics of any layer score above this (`outlier_scores`); 0 drops
        nobody. Only clients that trained from the same model are compared.
    clip_quantile : float
        In (0, 1]: updates are clipped to a bound that follows this quantile of their norms; 1
        never clips.
    max_examples_ratio : float
        Cut example counts to this times the round's median; 0 sets no limit.
    """

    outlier_threshold: float = checked(20.0, at_least(0))
    clip_quantile: float = checked(0.5, FRACTION)
    max_examples_ratio: float = checked(3.0, ZERO_OR_RATIO)

    @classmethod
    def of(cls, config: RunConfig) -> Self:
        """The preset with a run config's limits."""
        return cls(**{item.name: getattr(config, item.name) for item in fields(cls)})

    def __str__(self) -> str:
        return (
            f"outlier threshold {self.outlier_threshold:g}, clip quantile {self.clip_quantile:g}, "
            f"examples at most {self.max_examples_ratio:g} times the median"
        )

    def screen(
        self,
        replies: list[ClientReply],
        expected: Expected | None,
        report: RoundReport,
        phase: str,
        bounds: dict[str, float],
    ) -> tuple[list[ClientReply], list[ClientRow]]:
        """Return the replies that count, cut and clipped, and the rows of the dropped ones.

        Parameters
        ----------
        replies : list[ClientReply]
            Good ones, sorted by client.
        expected : Callable[[int, Mapping[str, float]], Mapping[str, Tensor]] or None
            The model that a client trained from, as in `ReplyJudge`. None in an evaluation, where
            only counts are cut.
        report : RoundReport
            Receives the counts.
        phase : str
            Kind of training; each has its own clipping bound.
        bounds : dict[str, float]
            Clipping bound by phase, from earlier rounds; updated in place.
        """
        if expected is None:
            return self._cap_examples(replies, report), []
        sent = {reply.client: expected(reply.client, reply.metrics) for reply in replies}
        replies, dropped = self._drop_outliers(replies, sent, report)
        replies = self._cap_examples(replies, report)
        return self._clip(replies, sent, report, phase, bounds), dropped

    def _cap_examples(self, replies: list[ClientReply], report: RoundReport) -> list[ClientReply]:
        if not replies or not self.max_examples_ratio:
            return replies
        counts = [reply.num_examples for reply in replies]
        capped: list[ClientReply] = []
        for reply, count in zip(replies, cap_counts(counts, self.max_examples_ratio), strict=True):
            if count < reply.num_examples:
                note = f"{reply.num_examples} examples count as {count}"
                reply = _noted(reply, report, note, num_examples=count)
                report.add("examples-capped", 1)
            capped.append(reply)
        return capped

    def _drop_outliers(
        self, replies: list[ClientReply], sent: Sent, report: RoundReport
    ) -> tuple[list[ClientReply], list[ClientRow]]:
        if not self.outlier_threshold:
            return replies, []
        kept: list[ClientReply] = []
        dropped: list[ClientRow] = []
        scores = _worst_scores(replies, sent)
        for reply in replies:
            judged, score = scores.get(reply.client, (False, 0.0))
            note = (
                f"its normalization statistics score {score:.3g}, outlier-threshold is "
                f"{self.outlier_threshold:g}"
            )
            if judged and score > self.outlier_threshold:
                dropped.append(replace(reply.row(), dropped=OUTLIER, detail=note))
                continue
            reply = _measured(reply, OUTLIER_SCORE, score)
            if score > self.outlier_threshold:
                note = f"kept, because fewer than {FEWEST_TO_JUDGE} can be compared, but {note}"
                reply = _noted(reply, report, note)
                report.add("outliers-kept", 1)
            kept.append(reply)
        return kept, dropped

    def _clip(
        self,
        replies: list[ClientReply],
        sent: Sent,
        report: RoundReport,
        phase: str,
        bounds: dict[str, float],
    ) -> list[ClientReply]:
        if not replies or self.clip_quantile == 1:
            return replies
        norms = [squared_distance(reply.state, sent[reply.client]) ** 0.5 for reply in replies]
        bound = bounds.get(phase) or float(np.quantile(norms, self.clip_quantile))
        if not bound:
            return replies
        bounds[phase] = next_bound(bound, norms, self.clip_quantile)
        report.metrics[CLIP_BOUND] = bound
        clipped: list[ClientReply] = []
        for reply, norm in zip(replies, norms, strict=True):
            reply = _measured(reply, UPDATE_NORM, norm)
            if norm > bound:
                note = f"update of norm {norm:.3g} clipped to {bound:.3g}"
                shorter = clip_update(reply.state, sent[reply.client], norm, bound)
                reply = _noted(reply, report, note, INFO, state=shorter)
            clipped.append(reply)
        report.add("updates-clipped", sum(norm > bound for norm in norms))
        return clipped


def _worst_scores(replies: list[ClientReply], sent: Sent) -> dict[int, tuple[bool, float]]:
    """By client: whether enough clients were compared to judge it, and its highest score.

    Scores the running statistics, which are fused, and the record, which inference reads: a client
    may lie in only one of them.
    """
    groups: dict[tuple[str, int, int], list[tuple[int, Moments]]] = {}
    for reply in replies:
        record = reply.statistics
        sources = {
            "model": moments_of(reply.state),
            "record": [] if record is None else [(record.mean, record.std.square())],
        }
        for source, moments in sources.items():
            if moments:
                comparable = source, id(sent[reply.client]), len(moments[0][0])
                groups.setdefault(comparable, []).append((reply.client, moments))
    worst: dict[int, tuple[bool, float]] = {}
    for group in groups.values():
        scores = outlier_scores([moments for _, moments in group]).max(1).values.tolist()
        judged = len(group) >= FEWEST_TO_JUDGE
        for (client, _), score in zip(group, scores, strict=True):
            worst[client] = max(worst.get(client, (False, 0.0)), (judged, score))
    return worst


def _measured(reply: ClientReply, name: str, value: float) -> ClientReply:
    """Set a metric that the server measured, replacing any that the client sent under that name."""
    return replace(reply, metrics={**reply.metrics, name: value})


def _noted(
    reply: ClientReply, report: RoundReport, note: str, level: int = WARNING, **changes: Any
) -> ClientReply:
    """The changed reply; why is logged and noted in it."""
    place = report.server_round, reply.client, reply.node
    log(level, "round %d: client %d (node %d): %s", *place, note)
    detail = f"{reply.detail}; {note}" if reply.detail else note
    return replace(reply, detail=detail, **changes)
