# SPDX-License-Identifier: Apache-2.0
"""Local training and evaluation on tensors that already lie in memory."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from fedfusion_flwr.errors import FedFusionError
from fedfusion_flwr.fusion.statistics import collected_moments

EVALUATION_BATCH = 512


class TrainingError(FedFusionError, RuntimeError):
    """Local training that cannot start or went wrong; the client's reply says why."""


def train(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    epochs: int,
    batch_size: int,
    learning_rate: float,
    momentum: float,
    weight_decay: float,
    generator: torch.Generator,
    fused_normalization: bool = False,
    augment: Callable[[Tensor], Tensor] | None = None,
    precision: str = "fp32",
    compiled: bool = False,
) -> float:
    """Minimize the cross-entropy by SGD with momentum, in place.

    Parameters
    ----------
    model : nn.Module
        Trained in place.
    x, y : Tensor
        Inputs (N, ...) and labels (N,), on the model's device.
    epochs, batch_size, learning_rate, momentum, weight_decay
        As usual; a last batch of one example joins the one before.
    generator : torch.Generator
        Source of the shuffles, on the CPU. Its seed is also that of dropout and whatever else the
        model draws; the global random state is left as it was.
    fused_normalization : bool
        Normalize with the received running statistics instead of those of the batch; affine
        parameters are trained all the same. Afterwards the running statistics are measured on x.
    augment : Callable[[Tensor], Tensor], optional
        Applied to the inputs of every batch.
    precision : {"fp32", "bf16"}
        ``bf16`` computes the forward pass under autocast; parameters, statistics and the loss stay
        float32.
    compiled : bool
        Train through ``torch.compile``; the first call for a model takes tens of seconds.

    Returns
    -------
    float
        Mean loss over the last epoch's examples.

    Raises
    ------
    TrainingError
        If there are no examples, just one where BatchNorm needs two, the loss turns non-finite, or
        the model cannot be compiled.
    """
    if len(x) == 0:
        raise TrainingError("this client has no training examples; give it data or leave it out")
    batchnorms = [m for m in model.modules() if isinstance(m, _BatchNorm)]
    if len(x) == 1 and batchnorms and not fused_normalization:
        raise TrainingError(
            "this client has one training example, and BatchNorm needs at least two; "
            "raise min-partition-size or lower validation-fraction"
        )
    model.train()
    if fused_normalization:
        for module in batchnorms:
            module.eval()
    optimizer = torch.optim.SGD(
        model.parameters(), lr=learning_rate, momentum=momentum, weight_decay=weight_decay
    )
    forward = compiled_forward(model) if compiled else model
    mean_loss = math.nan
    with own_random_state(generator.initial_seed(), x.device), compiler_errors():
        for epoch in range(epochs):
            total = torch.zeros((), dtype=torch.float64)
            for index in shuffled_batches(len(x), batch_size, generator):
                rows = index.to(x.device)
                inputs = x[rows] if augment is None else augment(x[rows])
                with autocast(x.device, precision):
                    logits = forward(inputs)
                loss = F.cross_entropy(logits.float(), y[rows])
                optimizer.zero_grad(set_to_none=True)
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                total += loss.detach().double().cpu() * len(index)
            mean_loss = float(total) / len(x)
            if not math.isfinite(mean_loss):
                raise TrainingError(
                    f"the training loss turned non-finite in local epoch {epoch + 1}; "
                    "lower learning-rate or check the data for bad values"
                )
    if fused_normalization:
        measure_running_statistics(model, x)
    return mean_loss


def shuffled_batches(count: int, batch_size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Index batches of one shuffled epoch; a trailing single index joins the batch before."""
    order = torch.randperm(count, generator=generator)
    start = 0
    while start < count:
        end = start + batch_size
        if count - end == 1:
            end = count
        yield order[start:end]
        start = end


def evaluate(
    model: nn.Module, x: Tensor, y: Tensor, precision: str = "fp32"
) -> tuple[float, float]:
    """Mean cross-entropy and accuracy in [0, 1], in eval mode; the mode is left at eval.

    ``precision`` is that of `train`.

    Raises
    ------
    TrainingError
        If there are no examples.
    """
    if len(x) == 0:
        raise TrainingError("there are no examples to evaluate on")
    model.eval()
    loss, correct = 0.0, 0
    with torch.inference_mode():
        for rows, labels in zip(
            torch.split(x, EVALUATION_BATCH), torch.split(y, EVALUATION_BATCH), strict=True
        ):
            with autocast(x.device, precision):
                logits = model(rows).float()
            loss += float(F.cross_entropy(logits, labels, reduction="sum"))
            correct += int((logits.argmax(1) == labels).sum())
    return loss / len(x), correct / len(x)


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """A context that computes in bfloat16 where that is safe, or changes nothing for ``fp32``."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16")


@contextmanager
def own_random_state(seed: int, device: torch.device) -> Iterator[None]:
    """While open, the global generators of the CPU and the device start from ``seed``.

    Layers such as dropout draw from them: no generator can be handed to those.
    """
    accelerators = [torch.cuda.current_device()] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=accelerators):
        torch.default_generator.manual_seed(seed)
        if accelerators:
            torch.cuda.manual_seed(seed)
        yield


@functools.lru_cache(maxsize=2)
def compiled_forward(model: nn.Module) -> Callable[[Tensor], Tensor]:
    """The model's forward pass through ``torch.compile``, made once; the model stays as it is.

    Evaluation and probes go on calling the model itself: hooks are not seen by compiled code.
    """
    run = torch.compile(model)

    def forward(x: Tensor) -> Tensor:
        # One graph for all batch sizes: code made for the size that happens to come first would
        # make a client's result depend on who else trained in this process.
        torch._dynamo.maybe_mark_dynamic(x, 0)
        logits: Tensor = run(x)
        return logits

    return forward


@contextmanager
def compiler_errors() -> Iterator[None]:
    """While open, say in one sentence why a model does not compile and what to do."""
    try:
        yield
    except RuntimeError as problem:
        # Not above: only a run that compiles has paid for this import.
        from torch._dynamo.exc import TorchDynamoException

        if not isinstance(problem, TorchDynamoException):
            raise
        reason = str(problem).strip().splitlines()[0]
        raise TrainingError(
            f"compile = true, but the model cannot be compiled here ({reason}); install a C++ "
            "compiler or use compile = false"
        ) from problem


def measure_running_statistics(model: nn.Module, x: Tensor) -> None:
    """Set every BatchNorm's running statistics to the moments of its input on x.

    The layers normalize with their old statistics while being measured, as they did in training.
    """
    layers = {n: m for n, m in model.named_modules() if isinstance(m, _BatchNorm)}
    model.eval()
    with collected_moments(layers) as moments, torch.no_grad():
        for rows in torch.split(x, EVALUATION_BATCH):
            model(rows)
    for name, layer in layers.items():
        mean, variance = moments[name].result()
        unbiased = moments[name].count / max(moments[name].count - 1, 1)
        if isinstance(layer.running_mean, Tensor) and isinstance(layer.running_var, Tensor):
            layer.running_mean.copy_(mean)
            layer.running_var.copy_(variance * unbiased)


def place_model(model: nn.Module, device: torch.device) -> nn.Module:
    """Move a model to its device; channels-last, which convolutions are faster in."""
    return model.to(device).to(memory_format=torch.channels_last)


def choose_device(name: str) -> torch.device:
    """``auto`` takes a GPU where there is one.

    Raises
    ------
    TrainingError
        If ``cuda`` is asked for and absent.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise TrainingError("device = 'cuda', but no GPU is visible here; use device = 'auto'")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)
