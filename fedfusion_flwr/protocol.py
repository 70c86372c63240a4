# SPDX-License-Identifier: Apache-2.0
"""What travels between server and clients: names of records and keys, and codecs.

=============  ============  =========================================================
record         kind          content
=============  ============  =========================================================
arrays         ArrayRecord   the full state dict
config         ConfigRecord  server -> client: ``server-round``, ``data-signature``,
                             ``label-calibration`` and what the strategy adds
metrics        MetricRecord  client -> server: ``num-examples`` and numbers to average
normalization  ArrayRecord   client -> server: ``mean std shift scale``, each (C,)
client         ConfigRecord  client -> server: ``server-round`` echoed, ``partition-id`` if any
=============  ============  =========================================================
"""

from __future__ import annotations

import functools
import io
import math
import warnings
from collections.abc import Mapping

import numpy as np
import torch
from flwr.app import Array, ArrayRecord
from numpy.lib import format as npy
from numpy.typing import NDArray
from torch import Tensor

from fedfusion_flwr.errors import FedFusionError
from fedfusion_flwr.fusion import NormalizationStatistics

ARRAYS = "arrays"
CONFIG = "config"
METRICS = "metrics"
NORMALIZATION = "normalization"
CLIENT = "client"

SERVER_ROUND = "server-round"
PARTITION_ID = "partition-id"
DATA_SIGNATURE = "data-signature"
LABEL_CALIBRATION = "label-calibration"
"""tau of the clients' loss, 0 or above, after the strategy's own was put in."""
NUM_EXAMPLES = "num-examples"
TRAIN_LOSS = "train-loss"
TRAIN_STARTED = "train-started"
TRAIN_SECONDS = "train-seconds"

GRADIENT_STEPS = "gradient-steps"
FORWARD_EXAMPLES = "forward-examples"

# What a strategy may set in the config of a train message; the run config is the default.
PHASE = "phase"
"""Name of an extra training, so that it draws its own random numbers."""
TRAINING = "training"
"""The phase of a round's regular training."""
PROXIMAL_MU = "proximal-mu"
MAX_STEPS = "max-steps"
"""Take this many gradient steps, however many epochs they need."""
LOCAL_EPOCHS = "local-epochs"
LEARNING_RATE = "learning-rate"
FROZEN = "frozen"
"""Names of state-dict entries that are not trained."""
CLASS_COUNTS = "class-counts"
"""Asks for the client's number of training examples per class; in a reply's metrics, these."""
NUM_MODELS = "num-models"
"""How many models the arrays hold, packed by `pack_states`: train the one of least loss."""
CLUSTER = "cluster"
"""In a reply's metrics: the number of the model that was chosen."""

STATISTICS_KEYS = ("mean", "std", "shift", "scale")
NPY_OVERHEAD = 4096
"""More than any plain array's .npy header: how much an honest payload may exceed its data by."""
MAX_DIMENSIONS = 32


class ProtocolError(FedFusionError, ValueError):
    """A record that does not decode to what it should hold."""


def _header_bytes(data: bytes) -> bytes:
    """The .npy header alone, whose length it states itself."""
    prefix, size = (12, data[8:12]) if data[6:7] == b"\x02" else (10, data[8:10])
    return data[: min(prefix + int.from_bytes(size, "little"), NPY_OVERHEAD)]


@functools.lru_cache(maxsize=4096)  # The same in every reply of a run, and slow to parse.
def _header(data: bytes) -> tuple[tuple[int, ...], bool, np.dtype[np.generic], int]:
    """Shape, memory order, type and length of the .npy header at the start of ``data``."""
    stream = io.BytesIO(data)
    try:
        version = npy.read_magic(stream)
        if version == (1, 0):
            shape, fortran_order, dtype = npy.read_array_header_1_0(stream)
        elif version == (2, 0):
            shape, fortran_order, dtype = npy.read_array_header_2_0(stream)
        else:
            raise ProtocolError(f".npy format version {version} is not accepted")
    except ProtocolError:
        raise
    except Exception as error:
        raise ProtocolError(f"not a .npy payload ({error})") from error
    if dtype.kind not in "biuf":
        raise ProtocolError(f"dtype {dtype} is not accepted")
    # The header is the sender's text: negative, boolean or absurdly many dimensions are possible.
    if len(shape) > MAX_DIMENSIONS or not all(type(n) is int and n >= 0 for n in shape):
        raise ProtocolError(f"shape {shape!s:.60} is not accepted")
    return shape, fortran_order, dtype, stream.tell()


def array_view(array: Array) -> NDArray[np.generic]:
    """Decode an Array without copying: a read-only view of its bytes.

    The labels ``array.dtype`` and ``array.shape`` are written by the sender and are not trusted.

    Raises
    ------
    ProtocolError
        If the payload is not a plain .npy array of exactly the announced size.
    """
    if array.stype != "numpy.ndarray":
        raise ProtocolError(f"serialized as {array.stype!r} instead of 'numpy.ndarray'")
    shape, fortran_order, dtype, offset = _header(_header_bytes(array.data))
    if math.prod(shape) * dtype.itemsize != len(array.data) - offset:
        raise ProtocolError(f"shape {shape} does not fit {len(array.data) - offset} bytes of data")
    try:
        flat = np.frombuffer(array.data, dtype=dtype, offset=offset)
        return flat.reshape(shape, order="F" if fortran_order else "C")
    except (ValueError, OverflowError) as error:
        raise ProtocolError(f"shape {shape!s:.60} is not accepted ({error})") from error


def state_from_record(record: Mapping[str, Array]) -> dict[str, Tensor]:
    """An ArrayRecord as a state dict whose tensors share memory with it: do not write to them."""
    return {key: tensor_view(array_view(array)) for key, array in record.items()}


def tensor_view(view: NDArray[np.generic]) -> Tensor:
    """A tensor that shares memory with a read-only view: do not write to it."""
    return torch.from_numpy(view)


with warnings.catch_warnings():
    # Torch warns about read-only arrays once per process. Here they are intended; a filter around
    # each call would cost more than the call.
    warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
    torch.from_numpy(np.frombuffer(bytes(1), dtype=np.uint8))


def record_from_state(state: Mapping[str, Tensor]) -> ArrayRecord:
    """A state dict as an ArrayRecord; integer tensors keep their type."""
    return ArrayRecord({key: Array(value.detach().cpu().numpy()) for key, value in state.items()})


def pack_states(states: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Several state dicts as one, with keys ``{name}/{key}``."""
    return {f"{name}/{key}": v for name, state in states.items() for key, v in state.items()}


def unpack_states(packed: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Invert `pack_states`."""
    states: dict[str, dict[str, Tensor]] = {}
    for packed_key, value in packed.items():
        name, _, key = packed_key.partition("/")
        states.setdefault(name, {})[key] = value
    return states


def record_from_statistics(statistics: NormalizationStatistics) -> ArrayRecord:
    """The ``normalization`` record: float32 vectors ``mean std shift scale``."""
    return record_from_state({key: getattr(statistics, key).float() for key in STATISTICS_KEYS})


def statistics_from_record(record: Mapping[str, Array]) -> NormalizationStatistics:
    """Decode and check a ``normalization`` record.

    Raises
    ------
    ProtocolError
        If a vector is missing, is not finite or differs from the others in type or length, or if a
        standard deviation is negative.
    """
    if set(record) != set(STATISTICS_KEYS):
        raise ProtocolError(f"holds {sorted(record)} instead of {list(STATISTICS_KEYS)}")
    views = {key: array_view(record[key]) for key in STATISTICS_KEYS}
    for key, view in views.items():
        if view.dtype != np.float32 or view.ndim != 1:
            raise ProtocolError(f"'{key}' is {view.dtype}{view.shape}, not a float32 vector")
        if not np.isfinite(view).all():
            raise ProtocolError(f"'{key}' is not finite")
    if len({view.shape for view in views.values()}) != 1:
        raise ProtocolError("its vectors differ in length")
    if float(views["std"].min(initial=0)) < 0:
        raise ProtocolError("'std' is negative")
    return NormalizationStatistics(**{k: tensor_view(v) for k, v in views.items()})
