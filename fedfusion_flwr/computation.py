# SPDX-License-Identifier: Apache-2.0
"""How a model is computed: device, precision, compilation, random state."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from logging import WARNING

import torch
from flwr.common.logger import log
from torch import Tensor, nn

from fedfusion_flwr.errors import FedFusionError, first_line


class TrainingError(FedFusionError, RuntimeError):
    """Local training could not start or failed; the client's reply says why."""


def place_model(model: nn.Module, device: torch.device) -> nn.Module:
    """Move a model to its device, in channels-last format, in which convolutions are faster."""
    return model.to(device).to(memory_format=torch.channels_last)


def choose_device(name: str, precision: str = "fp32") -> torch.device:
    """``auto`` takes a GPU if there is one; a precision that is slow there is logged once.

    Raises
    ------
    TrainingError
        If ``cuda`` is requested and absent.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise TrainingError("device = 'cuda', but no GPU is visible here; use device = 'auto'")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    warn_of_slow_precision(device, precision)
    return device


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """A context that computes in bfloat16 where that is safe, or changes nothing for ``fp32``."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16")


def has_bfloat16(device: torch.device) -> bool:
    """Whether the device computes in bfloat16 natively, without converting every number.

    GPUs do since compute capability 8. CPUs compute with oneDNN, which needs AVX-512 or Arm's bf16;
    without oneDNN it cannot be found out and is assumed.
    """
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return True
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def slow_precision(device: torch.device, precision: str) -> str | None:
    """Why a device is slow in this precision and what to do, one sentence; None if it is not."""
    if precision != "bf16" or has_bfloat16(device):
        return None
    processor = "GPU" if device.type == "cuda" else "CPU"
    return (
        f"precision = 'bf16' is emulated here, as this {processor} cannot compute in "
        "bfloat16: that can take more than ten times as long as precision = 'fp32'"
    )


@functools.cache
def warn_of_slow_precision(device: torch.device, precision: str) -> None:
    """Log `slow_precision`, if there is something to say, once in a process."""
    advice = slow_precision(device, precision)
    if advice:
        log(WARNING, "%s", advice)


@contextmanager
def own_random_state(seed: int, device: torch.device) -> Iterator[None]:
    """While open, the global generators of the CPU and the device start from ``seed``.

    Layers such as dropout draw from them and cannot be given a generator.
    """
    accelerators = [torch.cuda.current_device()] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=accelerators):
        torch.default_generator.manual_seed(seed)
        if accelerators:
            torch.cuda.manual_seed(seed)
        yield


@functools.lru_cache(maxsize=2)
def compiled_forward(model: nn.Module) -> Callable[[Tensor], Tensor]:
    """The model's forward pass through ``torch.compile``, made once; the model is not changed.

    Evaluation and probes still call the model itself: compiled code ignores hooks.
    """
    run = torch.compile(model)

    def forward(x: Tensor) -> Tensor:
        # One graph for all batch sizes: code specialized for the size that happens to come first
        # would make a client's result depend on who else trained in this process.
        torch._dynamo.maybe_mark_dynamic(x, 0)
        logits: Tensor = run(x)
        return logits

    return forward


@contextmanager
def compiler_errors() -> Iterator[None]:
    """While open, turn a compiler's errors into one sentence that says what to do."""
    try:
        yield
    except RuntimeError as problem:
        # Imported here: it is slow, unless the run compiles and has imported it already.
        from torch._dynamo.exc import TorchDynamoException

        if not isinstance(problem, TorchDynamoException):
            raise
        raise TrainingError(
            f"compile = true, but the model cannot be compiled here ({first_line(problem)}); "
            "install a C++ compiler or use compile = false"
        ) from problem
