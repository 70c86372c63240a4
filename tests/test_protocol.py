# SPDX-License-Identifier: Apache-2.0
"""Codecs: bit for bit, without copies, and only a `ProtocolError` for broken payloads."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedfusion_flwr import protocol
from fedfusion_flwr.fusion import NormalizationStatistics
from fedfusion_flwr.protocol import ProtocolError, array_view
from tests.support import assert_identical, npy_payload, saved, tiny_model


def raw(data: bytes, stype: str = "numpy.ndarray") -> Array:
    return Array(dtype="float32", shape=(2, 2), stype=stype, data=data)


GRID = torch.arange(24, dtype=torch.float32).reshape(2, 3, 4)
TENSORS: dict[str, Tensor] = {
    "float32": GRID / 7,
    "float64": GRID.double() / 7,
    "float16": GRID.half() / 7,
    "int64": torch.tensor([-(2**62), 0, 2**62]),
    "int32": torch.tensor([[1, -2]], dtype=torch.int32),
    "uint8": torch.tensor([0, 255], dtype=torch.uint8),
    "bool": torch.tensor([True, False]),
    "0-dim": torch.tensor(3.5),
    "0-dim int": torch.tensor(7),
    "empty": torch.empty(0),
    "empty with shape": torch.empty(2, 0, 3),
    "Fortran order": GRID[0].T,
    "non-contiguous": GRID[:, ::2, 1::2],
    "channels last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
    "expanded": torch.tensor([1.0, 2.0]).expand(3, 2),
    "special values": torch.tensor([float("nan"), float("inf"), -0.0, 1e-45]),
    "needs gradient": torch.ones(2, requires_grad=True),
}


@pytest.mark.parametrize("name", TENSORS)
def test_round_trip_bit_for_bit(name: str) -> None:
    tensor = TENSORS[name].detach()
    record = protocol.record_from_state({"x": TENSORS[name]})
    (back,) = protocol.state_from_record(record).values()
    assert back.dtype == tensor.dtype
    assert back.shape == tensor.shape
    assert back.numpy().tobytes() == tensor.numpy().tobytes()


def test_round_trip_of_a_model() -> None:
    state = tiny_model().state_dict()
    assert_identical(protocol.state_from_record(protocol.record_from_state(state)), state)


@pytest.mark.parametrize("order", ["C", "F"])
def test_view_copies_nothing(order: str) -> None:
    array = Array(np.asarray(GRID[0].numpy(), order=order))  # type: ignore[call-overload]
    view = array_view(array)
    assert np.shares_memory(view, np.frombuffer(array.data, dtype=np.uint8))
    assert not view.flags.writeable
    tensor = protocol.state_from_record({"x": array})["x"]
    assert tensor.data_ptr() == view.ctypes.data


def test_labels_are_not_trusted() -> None:
    array = raw(saved(np.arange(3)))
    assert array_view(array).tolist() == [0, 1, 2]


def header(shape: str, descr: str = "'<f4'") -> str:
    return f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}"


GOOD = saved(np.arange(4, dtype="f4"))


BROKEN: dict[str, bytes] = {
    "nothing": b"",
    "negative shape": npy_payload(header("(-2, -2)"), bytes(16)),
    "boolean shape": npy_payload(header("(True, 4)"), bytes(16)),
    "seventy dimensions": npy_payload(header(str((1,) * 70)), bytes(4)),
    "empty but huge": npy_payload(header(f"(0, {10**30})")),
    "magic only": b"\x93NUMPY",
    "version 3": b"\x93NUMPY\x03\x00" + GOOD[8:],
    "version 9": b"\x93NUMPY\x09\x00" + GOOD[8:],
    "zip": b"PK\x03\x04" + bytes(100),
    "pickle": b"\x80\x04N.",
    "no data": GOOD[:-16],
    "one byte short": GOOD[:-1],
    "one byte more": GOOD + b"\0",
    "header cut": GOOD[:40],
    "header no dict": npy_payload("[1, 2]"),
    "header no literal": npy_payload("__import__('os')"),
    "header keys": npy_payload("{'descr': '<f4', 'shape': ()}", bytes(4)),
    "shape no tuple": npy_payload(header("4"), bytes(16)),
    "shape of floats": npy_payload(header("(4.0,)"), bytes(16)),
    "shape too large": npy_payload(header("(1000000, 1000000)"), bytes(16)),
    "shape overflows": npy_payload(header("(4294967296, 4294967296)"), b""),
    "one negative length": npy_payload(header("(-4,)"), bytes(16)),
    "no such dtype": npy_payload(header("(4,)", "'<f3'"), bytes(16)),
    "object": saved(np.array([None], dtype=object), allow_pickle=True),
    "structured": saved(np.zeros(2, dtype=[("a", "f4"), ("b", "i4")])),
    "complex": saved(np.zeros(2, dtype="c8")),
    "text": saved(np.array(["ab"])),
    "bytes": saved(np.array([b"ab"])),
    "dates": saved(np.zeros(2, dtype="M8[s]")),
    "void": saved(np.zeros(2, dtype="V4")),
    "deep header": npy_payload("(" * 3000),
    "long header": npy_payload(header("(1,)") + " " * 20_000, bytes(4)),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_payload(name: str) -> None:
    with pytest.raises(ProtocolError, match=r"."):
        array_view(raw(BROKEN[name]))


def test_other_serialization() -> None:
    with pytest.raises(ProtocolError, match="'pickle'"):
        array_view(raw(GOOD, stype="pickle"))


def decoded_or_refused(data: bytes) -> None:
    try:
        view = array_view(raw(data))
    except ProtocolError:
        return
    assert view.nbytes <= len(data)


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=300), st.booleans())
def test_random_bytes_are_refused(data: bytes, magic: bool) -> None:
    decoded_or_refused(b"\x93NUMPY\x01\x00" + data if magic else data)


edits = st.lists(st.tuples(st.integers(0, 200), st.integers(0, 255)), min_size=1, max_size=4)


@settings(max_examples=300, deadline=None)
@given(edits, st.integers(0, 20))
def test_mutated_payload_is_refused_or_decoded(changes: list[tuple[int, int]], cut: int) -> None:
    data = bytearray(GOOD)
    for position, value in changes:
        data[position % len(data)] = value
    decoded_or_refused(bytes(data[: len(data) - cut]))


lengths = st.one_of(st.integers(0, 5), st.integers(10**6, 10**12))


@settings(max_examples=200, deadline=None)
@given(st.lists(lengths, min_size=1, max_size=3).filter(all))
@example([10**12])
def test_lying_header_allocates_nothing(shape: list[int]) -> None:
    data = npy_payload(header(repr(tuple(shape))), bytes(16))
    array = raw(data)
    tracemalloc.start()
    decoded_or_refused(data)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1_000_000
    assert array.data is data


def statistics() -> NormalizationStatistics:
    return NormalizationStatistics.from_state_dict(tiny_model().state_dict())


def test_statistics_round_trip() -> None:
    sent = statistics()
    got = protocol.statistics_from_record(protocol.record_from_statistics(sent))
    for key in protocol.STATISTICS_KEYS:
        assert getattr(got, key).dtype == torch.float32
        assert torch.equal(getattr(got, key), getattr(sent, key))


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("mean", np.zeros(2), "'mean' is float64"),
        ("std", np.zeros((1, 2), "f4"), "not a float32 vector"),
        ("std", np.ones((), "f4"), "not a float32 vector"),
        ("scale", np.array([0, np.nan], "f4"), "'scale' is not finite"),
        ("shift", np.array([np.inf, 0], "f4"), "'shift' is not finite"),
        ("std", np.array([1, -1e-6], "f4"), "'std' is negative"),
        ("mean", np.zeros(3, "f4"), "differ in length"),
        ("variance", np.zeros(2, "f4"), "instead of"),
        ("mean", np.array([0, 1], ">f4"), "not a float32 vector"),
    ],
)
def test_bad_statistics(key: str, value: np.ndarray, words: str) -> None:
    record = protocol.record_from_statistics(statistics())
    record[key] = Array(value)
    with pytest.raises(ProtocolError, match=words):
        protocol.statistics_from_record(record)


def test_missing_and_garbled_statistics() -> None:
    record = protocol.record_from_statistics(statistics())
    record["mean"] = raw(b"x")
    with pytest.raises(ProtocolError, match="npy"):
        protocol.statistics_from_record(record)
    del record["mean"]
    with pytest.raises(ProtocolError, match="instead of"):
        protocol.statistics_from_record(record)
    with pytest.raises(ProtocolError):
        protocol.statistics_from_record(ArrayRecord())
