# SPDX-License-Identifier: Apache-2.0
"""`ReplyJudge` alone, which takes milliseconds: many made-up replies, and changed bytes.

`FUZZ_EXAMPLES` sets how many; see `tests/fuzz/test_replies.py`.
"""

from __future__ import annotations

import json
import tracemalloc
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ConfigRecord, Error, Message, RecordDict
from flwr.supercore.inflatable.inflatable_object import (
    add_header_to_object_body,
    get_all_nested_objects,
    get_object_body,
    get_object_id,
)
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from hypothesis import event, given
from hypothesis import strategies as st

from fedfusion_flwr import protocol
from fedfusion_flwr.federation.replies import ClientReply, ReplyJudge
from tests.fuzz.mutations import SPOIL
from tests.fuzz.test_replies import EXAMPLES, REASONS, fuzzing
from tests.support import (
    FakeClient,
    Spoil,
    TamperingGrid,
    assert_identical,
    honest_state,
    npy_payload,
    tiny_model,
)

NODES = {11: 0, 12: 1, 13: 2}
FUZZED = 13
SENT = tiny_model().state_dict()


def judge(replies: list[Message], **settings: Any) -> tuple[list[ClientReply], list[Any]]:
    return ReplyJudge(4, NODES, lambda *_: SENT, num_channels=2, **settings).judge(replies)


def reply_of(node: int, spoil: Spoil | None = None) -> Message:
    """A client's reply in round 4; an error if making it fails."""
    grid = TamperingGrid(FakeClient(), 0)
    content = RecordDict({"arrays": protocol.record_from_state(SENT)})
    content["config"] = ConfigRecord({"server-round": 4})
    message = Message(content, node, "train")
    message.metadata.__dict__["_message_id"] = f"message-{node}"
    context = grid.contexts[grid.add_node({"partition-id": NODES[node]})]
    try:
        reply = FakeClient(spoil, hostile=tuple(NODES.values()))(message, context)
    except RuntimeError as problem:
        reply = Message(Error(1, str(problem)), reply_to=message)
    reply.metadata.__dict__["_src_node_id"] = node
    return reply


def check(good: list[ClientReply], bad: list[Any]) -> None:
    """Every client is counted once, and honest replies are unchanged."""
    assert [reply.client for reply in good] == sorted({reply.client for reply in good})
    ours = [row.client for row in bad if row.dropped not in ("stranger", "duplicate")]
    assert sorted([reply.client for reply in good] + ours) == sorted(NODES.values())
    for row in bad:
        event(f"dropped: {row.dropped}")
        assert row.dropped in REASONS | {"stranger", "duplicate", "missing"}
        assert row.detail
        assert row.detail.isprintable()
        assert len(row.detail) <= 300
    for reply in good:
        if reply.client != NODES[FUZZED]:
            assert_identical(reply.state, honest_state(SENT, reply.client))
        assert all(value.isfinite().all() for value in reply.state.values())
        assert 1 <= reply.num_examples <= 10_000_000


@fuzzing(max_examples=EXAMPLES or 100)
@given(SPOIL, st.permutations(list(NODES)))
def test_any_reply_in_any_order(spoil: Spoil, order: list[int]) -> None:
    check(*judge([reply_of(node, spoil if node == FUZZED else None) for node in order]))


@fuzzing(max_examples=EXAMPLES or 20)
@given(SPOIL, st.sampled_from([11, 12, 14, 1, 0, -1]), st.booleans())
def test_any_reply_in_anothers_name(spoil: Spoil, name: int, first: bool) -> None:
    """The judge takes the first of two replies in one name; `CarefulGrid` stops forged ones."""
    forged = reply_of(FUZZED, spoil)
    forged.metadata.__dict__["_src_node_id"] = name
    honest = [reply_of(11), reply_of(12)]
    good, bad = judge([forged, *honest] if first else [*honest, forged])
    assert NODES[FUZZED] in {row.client for row in bad if row.dropped == "missing"}
    untouched = {0, 1} - ({NODES[name]} if first and name in NODES else set())
    states = {reply.client: reply.state for reply in good}
    for client in untouched:
        assert_identical(states[client], honest_state(SENT, client))


CHANGE = st.tuples(
    st.integers(0, 99), st.floats(0, 1), st.binary(max_size=4), st.sampled_from([0, 1, 10**9])
)


@fuzzing(max_examples=EXAMPLES or 100)
@given(st.lists(CHANGE, min_size=1, max_size=3))
def test_bytes_changed_on_the_way(changes: list[tuple[int, float, bytes, int]]) -> None:
    """Flower decodes first: what it accepts is judged like any reply."""
    objects = get_all_nested_objects(reply_of(FUZZED))
    contents = {key: value.deflate() for key, value in objects.items()}
    # In the order of nesting, which is fixed; the keys are hashes that depend on the clock.
    keys = list(contents)
    top = next(key for key, value in objects.items() if isinstance(value, Message))
    for index, place, junk, kept in changes:
        key = keys[index % len(keys)]
        old = contents[key]
        at = int(place * len(old))
        contents[key] = old[:at] + junk + old[at + min(kept * len(junk), 10**9) :]
    try:
        message = inflate_object_from_contents(top, contents)
    except Exception as problem:  # noqa: BLE001 - `CarefulGrid` answers to it
        event(f"Flower: {type(problem).__name__}")
        return
    if not isinstance(message, Message):
        return
    message.metadata.__dict__["_src_node_id"] = FUZZED
    check(*judge([reply_of(11), message, reply_of(12)]))


@pytest.mark.parametrize("record", ["arrays", "normalization"])
@pytest.mark.parametrize("kind", ["payload", "claimed"])
def test_memory_is_bounded_before_decoding(record: str, kind: str) -> None:
    """Neither 64 MiB of real data nor terabytes that a header claims are copied."""
    header = "{'descr': '<f4', 'fortran_order': False, 'shape': (%d,)}"
    payload = {
        "payload": npy_payload(header % 2**24, bytes(2**26)),
        "claimed": npy_payload(header % 2**40),
    }[kind]
    reply = reply_of(FUZZED)
    arrays = reply.content.array_records[record]
    key = next(iter(arrays))
    arrays[key] = Array(dtype="float32", shape=(2, 2), stype="numpy.ndarray", data=payload)
    tracemalloc.start()
    try:
        good, bad = judge([reply])
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert not good
    assert bad[-1].dropped in ("size", "structure", "statistics")
    assert peak < 2**20


def test_flowers_own_decoding_is_not_bounded() -> None:
    """As docs/security.md says; if this fails, Flower has improved and the page is out of date."""
    array = Array(np.zeros(10_000, dtype="f4"))
    contents = {key: chunk.deflate() for key, chunk in array.slice_array()}
    body = json.loads(get_object_body(array.deflate(), Array))
    body["arraychunk_ids"] = [0] * 50
    bomb = add_header_to_object_body(json.dumps(body).encode(), array)
    contents[get_object_id(bomb)] = bomb
    sent = sum(len(content) for content in contents.values())
    inflated = inflate_object_from_contents(get_object_id(bomb), contents)
    assert isinstance(inflated, Array)
    assert len(inflated.data) > 40 * sent
