# SPDX-License-Identifier: Apache-2.0
"""Valid replies with one to five faults each, so that every check is reached."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tests.support import Spoil, npy_payload, saved

RECORDS = ("arrays", "normalization")

WHOLE = st.sampled_from(
    [0, 1, -1, 2, 2**31, 2**31 - 1, -(2**31), 2**63 - 1, -(2**63), 2**64, 10**18, 10**400]
)
REAL = st.sampled_from([0.0, -0.0, 1e-320, 1e7, -1e7, 1e30, 3.4e38, 1e308, math.inf, math.nan, 0.5])
NUMBER = WHOLE | REAL | st.integers() | st.floats() | st.booleans()
KNOWN = "arrays metrics client num-examples train-loss round fc.weight \u202e"
NAME = st.sampled_from(["", *KNOWN.split()]) | st.text(max_size=12)
VALUE = NUMBER | st.text(max_size=8) | st.binary(max_size=8) | st.lists(NUMBER, max_size=4)
METRIC = NUMBER | st.lists(NUMBER, max_size=4)

TYPES = "<f4 >f4 <f8 <f2 |b1 <i8 <u8 |O <U3 |S2 |V8 <c8 <M8[s]"
DESCRIPTION = st.sampled_from([*TYPES.split(), ""]).map(repr) | st.sampled_from(
    ["[('a', '<f4')]", "None", "('<f4', (2,))", "'<f4' * 99", "[]"]
)
EXTENT = st.sampled_from(["0", "1", "2", "-1", "True", "None", "2.0", "'2'", "2**9", "9" * 30])
SHAPE = st.lists(EXTENT, max_size=40).map(lambda parts: f"({''.join(f'{p}, ' for p in parts)})")


def _set(data: Any, key: str, value: object) -> None:
    """Set a value without Flower's checks of keys and types, which a hostile client can skip."""
    data.__dict__["_data"][key] = value


KINDS = {"arrays": ArrayRecord, "normalization": ArrayRecord, "metrics": MetricRecord}


def _of(reply: Message, name: str) -> Any:
    """A record of the reply; an empty one if an earlier mutation removed or replaced it."""
    kind = KINDS.get(name, ConfigRecord)
    found = reply.content.get(name)
    return found if isinstance(found, kind) else kind()


PLACE = st.tuples(st.sampled_from(RECORDS), st.integers(0, 9))


def _array(reply: Message, place: tuple[str, int]) -> tuple[Any, str | None]:
    """A record of arrays and the key of one of them; None if it has none left."""
    arrays = _of(reply, place[0])
    keys = list(arrays)
    return arrays, keys[place[1] % len(keys)] if keys else None


@st.composite
def _payloads(draw: st.DrawFn) -> Callable[[bytes], bytes]:
    """Change the bytes of an array."""
    kind = draw(st.sampled_from(["cut", "more", "flip", "other", "header"]))
    if kind == "header":
        order = draw(st.sampled_from(["True", "False", "1", "None"]))
        text = f"{{'descr': {draw(DESCRIPTION)}, 'fortran_order': {order}, 'shape': {draw(SHAPE)}}}"
        payload = npy_payload(text, draw(st.binary(max_size=64)))
        return lambda _: payload
    if kind == "other":
        array = draw(
            hnp.arrays(
                hnp.scalar_dtypes() | hnp.unicode_string_dtypes(),
                hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4),
            )
        )
        return lambda _: saved(array)
    place, junk = draw(st.floats(0, 1)), draw(st.binary(min_size=1, max_size=8))

    def change(data: bytes) -> bytes:
        at = int(place * len(data))
        if kind == "cut":
            return data[:at]
        if kind == "more":
            return data[:at] + junk + data[at:]
        return data[:at] + junk + data[at + len(junk) :]

    return change


@st.composite
def _payload(draw: st.DrawFn) -> Spoil:
    place, change = draw(PLACE), draw(_payloads())
    # The server ignores these labels, but reads no serialization other than NumPy's.
    stype = st.sampled_from(["numpy.ndarray"] * 4 + ["torch.tensor"])
    shape = st.lists(st.integers(), max_size=3).map(tuple)
    labels = draw(st.none() | st.tuples(NAME, shape, stype))

    def spoil(reply: Message) -> None:
        arrays, key = _array(reply, place)
        if key is not None:
            array = arrays[key]
            dtype, shape, stype = labels or (array.dtype, array.shape, array.stype)
            data = change(array.data)
            _set(arrays, key, Array(dtype=dtype, shape=shape, stype=stype, data=data))

    return spoil


@st.composite
def _values(draw: st.DrawFn) -> Spoil:
    """Change numbers, and sometimes their type or count, in valid NumPy bytes."""
    place, number = draw(PLACE), draw(st.integers(0, 9))
    value = draw(REAL | st.floats(width=32))
    factor = draw(st.none() | st.sampled_from([-1.0, 0.0, 1.5, 10.0, 1e3, 1e20]))
    dtype = draw(st.none() | st.sampled_from(["<f8", ">f4", "<f2", "<i8", "<i4", "|b1"]))
    repeats = draw(st.sampled_from([1, 1, 1, 2, 3000]))

    def spoil(reply: Message) -> None:
        arrays, key = _array(reply, place)
        if key is None:
            return
        try:
            array = np.array(arrays[key].numpy())
        except (ValueError, TypeError, EOFError, AttributeError, SyntaxError, OverflowError):
            return  # an earlier mutation has broken it
        flat = array.reshape(-1)
        with np.errstate(all="ignore"):
            if factor is not None:
                array = np.asarray(array * factor, array.dtype)
            elif flat.size and array.dtype.kind in "iuf":
                flat[number % flat.size] = np.float64(value).astype(array.dtype)
            array = np.repeat(array, repeats, 0) if array.ndim else array
            array = array.astype(dtype) if dtype else array
        _set(arrays, key, Array(array))

    return spoil


@st.composite
def _keys(draw: st.DrawFn) -> Spoil:
    place, name = draw(PLACE), draw(NAME)
    kind = draw(st.sampled_from(["drop", "rename", "add", "many"]))

    def spoil(reply: Message) -> None:
        arrays, key = _array(reply, place)
        if key is None:
            return
        array = arrays[key]
        if kind in ("drop", "rename"):
            del arrays[key]
        if kind in ("rename", "add"):
            _set(arrays, name, array)
        if kind == "many":
            for number in range(2000):
                _set(arrays, f"{name}{number}", array)

    return spoil


@st.composite
def _metrics(draw: st.DrawFn) -> Spoil:
    kind = draw(st.sampled_from(["examples", "set", "drop", "many", "long"]))
    name, value, count = draw(NAME), draw(METRIC), draw(st.integers(1, 5000))

    def spoil(reply: Message) -> None:
        metrics = _of(reply, "metrics")
        if kind == "examples":
            _set(metrics, "num-examples", value)
        elif kind == "set":
            _set(metrics, name, value)
        elif kind == "drop":
            metrics.__dict__["_data"].pop("train-loss", None)
        elif kind == "long":
            _set(metrics, name, [0.5] * count)
        else:
            for number in range(count):
                _set(metrics, f"{name}{number}", value)

    return spoil


@st.composite
def _identity(draw: st.DrawFn) -> Spoil:
    key = draw(st.sampled_from(["server-round", "partition-id"]) | NAME)
    value = draw(VALUE)
    return lambda reply: _set(_of(reply, "client"), key, value)


@st.composite
def _records(draw: st.DrawFn) -> Spoil:
    """Remove a record, or replace it by one of any kind."""
    name = draw(st.sampled_from(["arrays", "normalization", "metrics", "client"]) | NAME)
    other = draw(
        st.sampled_from([None, ArrayRecord, MetricRecord, ConfigRecord])
        | st.just(lambda: ArrayRecord({"x": Array(np.zeros(3))}))
    )

    def spoil(reply: Message) -> None:
        if name in reply.content:
            del reply.content[name]
        if other is not None:
            reply.content[name] = other()

    return spoil


@st.composite
def _crash(draw: st.DrawFn) -> Spoil:
    reason = draw(st.text(max_size=40) | st.just("\x1b[2J" + "x" * 10_000) | st.just("\n \n"))

    def spoil(reply: Message) -> None:
        raise RuntimeError(reason)

    return spoil


MUTATION = st.one_of(_payload(), _values(), _keys(), _metrics(), _identity(), _records())


def apply_all(mutations: list[Spoil]) -> Spoil:
    """Apply several mutations in order."""

    def spoil(reply: Message) -> None:
        for mutation in mutations:
            mutation(reply)

    return spoil


_SEVERAL = st.lists(MUTATION, min_size=1, max_size=5).map(apply_all)
SPOIL = st.integers(0, 19).flatmap(lambda number: _SEVERAL if number else _crash())
"""One reply in twenty is an error; the others have one to five faults."""
