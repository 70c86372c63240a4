# SPDX-License-Identifier: Apache-2.0
"""Ways to spoil a client's reply, and the reason for which each is dropped.

These rows make Flower's own strategies return NaN, extrapolate, broadcast or stop.
"""

from __future__ import annotations

import math

import numpy as np
from flwr.app import Array, ArrayRecord, Message, MetricRecord

from tests.support import (
    COUNTER,
    MEAN,
    VARIANCE,
    WEIGHT,
    Spoil,
    edit_value,
    npy_payload,
    replace_metric,
    replace_payload,
    replace_value,
    saved,
)


def one(value: float, key: str = WEIGHT, record: str = "arrays") -> Spoil:
    """Overwrite a single number."""

    def edit(array: np.ndarray) -> np.ndarray:
        array.reshape(-1)[0] = value
        return array

    return edit_value(key, edit, record)


def drop(record: str, key: str | None = None) -> Spoil:
    """Leave out a record, or one entry of it."""

    def spoil(reply: Message) -> None:
        if key is None:
            del reply.content[record]
        else:
            del reply.content[record][key]

    return spoil


def second(record: MetricRecord | ArrayRecord) -> Spoil:
    def spoil(reply: Message) -> None:
        reply.content["more"] = record

    return spoil


def header(shape: str, data: bytes = b"") -> Spoil:
    text = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}}}"
    return replace_payload(WEIGHT, npy_payload(text, data))


def normalization(key: str, value: list[float], dtype: str = "float32") -> Spoil:
    return replace_value(key, value, dtype, record="normalization")


def echo(value: object) -> Spoil:
    def spoil(reply: Message) -> None:
        reply.content.config_records["client"].__dict__["_data"]["server-round"] = value

    return spoil


def oldest(reply: Message) -> None:
    reply.content.config_records["client"]["server-round"] = 0


def crash(reply: Message) -> None:
    raise OSError("disk is gone\nTraceback ...")


HUGE = {MEAN: -1e7, VARIANCE: 1e30, "norm.weight": 1e7, "norm.bias": -1e7}
GOOD = saved(np.zeros((2, 2), dtype="f4"))
SPOILED: dict[str, tuple[Spoil, str]] = {
    "negative shape in the header": (header("(-2, -2)", bytes(16)), "structure"),
    "one NaN": (one(math.nan), "nonfinite"),
    "one inf": (one(math.inf), "nonfinite"),
    "NaN running mean": (one(math.nan, MEAN), "nonfinite"),
    **{
        f"examples {value}": (replace_metric("num-examples", value), "examples")
        for value in (0, -10, 2.5, True, [10], [])
    },
    "examples 10**18": (replace_metric("num-examples", 10**18), "examples"),
    "examples NaN": (replace_metric("num-examples", math.nan), "nonfinite"),
    "examples inf": (replace_metric("num-examples", math.inf), "nonfinite"),
    "examples missing": (drop("metrics", "num-examples"), "examples"),
    "shape (2,) into (2, 2)": (replace_value(WEIGHT, [1, 2], "float32"), "shape"),
    "shape (2, 2) into (2,)": (replace_value(MEAN, [[1, 2], [3, 4]], "float32"), "shape"),
    "shape (1, 2, 2)": (edit_value(WEIGHT, lambda a: a[None]), "shape"),
    "0-dim counter as vector": (replace_value(COUNTER, [3], "int64"), "shape"),
    "float counter": (replace_value(COUNTER, 7.0, "float32"), "dtype"),
    "int32 counter": (replace_value(COUNTER, 7, "int32"), "dtype"),
    "float64 weights": (edit_value(WEIGHT, lambda a: a.astype("f8")), "dtype"),
    "int weights": (edit_value(WEIGHT, lambda a: a.astype("i4")), "dtype"),
    "big-endian weights": (edit_value(WEIGHT, lambda a: a.astype(">f4")), "dtype"),
    "a leap": (edit_value(WEIGHT, lambda a: a + np.float32(1e30)), "update"),
    "key missing": (drop("arrays", WEIGHT), "structure"),
    "key extra": (replace_value("backdoor", [1.0]), "structure"),
    "no model": (drop("arrays"), "structure"),
    "two models": (second(ArrayRecord({"x": Array(np.zeros(1))})), "structure"),
    "no metric record": (drop("metrics"), "structure"),
    "two metric records": (second(MetricRecord({"num-examples": 3})), "structure"),
    "false labels": (replace_payload(WEIGHT, saved(np.zeros(2))), "shape"),
    "NaN metric": (replace_metric("train-loss", math.nan), "nonfinite"),
    "inf in a metric list": (replace_metric("losses", [1.0, math.inf]), "nonfinite"),
    "object payload": (
        replace_payload(WEIGHT, saved(np.array([{}], dtype=object), allow_pickle=True)),
        "structure",
    ),
    "complex payload": (replace_payload(WEIGHT, saved(np.zeros(2, dtype="c8"))), "structure"),
    "text payload": (replace_payload(WEIGHT, saved(np.array(["weights"]))), "structure"),
    "garbage payload": (replace_payload(WEIGHT, b"\x80\x05garbage"), "structure"),
    "empty payload": (replace_payload(WEIGHT, b""), "structure"),
    "truncated payload": (replace_payload(WEIGHT, GOOD[:-1]), "structure"),
    "trailing payload": (replace_payload(WEIGHT, GOOD + b"x"), "structure"),
    "another serialization": (replace_payload(WEIGHT, b"x", stype="pickle"), "structure"),
    "lying header": (header("(99999999999,)"), "structure"),
    "oversize payload": (replace_payload(WEIGHT, bytes(100_000)), "size"),
    "oversize array": (edit_value(WEIGHT, lambda a: np.zeros(10_000, "f4")), "size"),
    "a million metrics in a list": (replace_metric("losses", [0.5] * 10**6), "size"),
    "a metric of an endless name": (replace_metric("x" * 10**6, 0.5), "size"),
    "negative variance": (one(-1e-3, VARIANCE), "statistics"),
    **{f"huge {key}": (one(value, key), "statistics") for key, value in HUGE.items()},
    "counter backwards": (edit_value(COUNTER, lambda a: a - 2), "statistics"),
    "counter near overflow": (replace_value(COUNTER, 2**63 - 1, "int64"), "statistics"),
    "normalization length": (normalization("mean", [0.0]), "statistics"),
    "normalization NaN": (normalization("mean", [0.0, math.nan]), "statistics"),
    "normalization std": (normalization("std", [1.0, -1.0]), "statistics"),
    "normalization huge": (normalization("shift", [1e9, 0.0]), "statistics"),
    "normalization float64": (normalization("mean", [0.0, 1.0], "float64"), "statistics"),
    "normalization matrix": (normalization("mean", [[0.0, 1.0]]), "statistics"),  # type: ignore[list-item]
    "normalization key missing": (drop("normalization", "scale"), "statistics"),
    "normalization key extra": (normalization("more", [0.0, 0.0]), "statistics"),
    "normalization oversize": (normalization("mean", [0.0] * 10_000), "size"),
    "round of before": (oldest, "stale"),
    "round as text": (echo("1"), "stale"),
    "round missing": (echo(None), "stale"),
    "client raises": (crash, "error"),
}
