# SPDX-License-Identifier: Apache-2.0
"""Local training and evaluation on tensors in memory."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from fedfusion_flwr.computation import (
    TrainingError,
    autocast,
    compiled_forward,
    compiler_errors,
    own_random_state,
)
from fedfusion_flwr.fusion.statistics import collected_moments

EVALUATION_BATCH = 512


class TrainingResult(NamedTuple):
    """The last epoch's mean loss and the number of gradient steps."""

    loss: float
    steps: int


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
    proximal_mu: float = 0.0,
    max_steps: int | None = None,
    frozen: Collection[str] = (),
    criterion: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
) -> TrainingResult:
    """Minimize the cross-entropy, or another loss, by SGD with momentum, in place.

    Parameters
    ----------
    model : nn.Module
        Trained in place.
    x, y : Tensor
        Inputs (N, ...) and labels (N,), on the model's device.
    epochs, batch_size, learning_rate, momentum, weight_decay
        As usual; a last batch of one example joins the previous batch.
    generator : torch.Generator
        Source of the shuffles, on the CPU. Its seed also seeds dropout and whatever else the model
        draws; the global random state is not changed.
    fused_normalization : bool
        Normalize with the received running statistics instead of those of the batch; affine
        parameters are still trained. Afterwards the running statistics are measured on x.
    augment : Callable[[Tensor], Tensor], optional
        Applied to the inputs of every batch.
    precision : {"fp32", "bf16"}
        ``bf16`` computes the forward pass under autocast; parameters, statistics and the loss stay
        float32.
    compiled : bool
        Train through ``torch.compile``; the first call for a model takes tens of seconds.
    proximal_mu : float
        Weight of the squared distance to the model as it was received, (mu / 2) ||w - w_t||^2 over
        all trained parameters (FedProx, Li et al. 2020).
    max_steps : int or None
        Take this many gradient steps, however many epochs they need.
    frozen : Collection[str]
        Names of state-dict entries that must not change. A BatchNorm layer whose running
        statistics are among them normalizes with those.
    criterion : Callable[[Tensor, Tensor], Tensor]
        Mean loss of float32 logits (n, C) and labels (n,).

    Returns
    -------
    TrainingResult
        Mean loss over the last epoch, which ``max_steps`` may cut short, and the steps taken.

    Raises
    ------
    TrainingError
        If there are no examples, just one where BatchNorm needs two, the loss turns non-finite, or
        the model cannot be compiled.
    """
    if len(x) == 0:
        raise TrainingError("this client has no training examples; give it data or leave it out")
    freeze(model, frozen)
    moving = moving_batchnorms(model, frozen).values()
    if len(x) == 1 and moving and not fused_normalization:
        raise TrainingError(
            "this client has one training example, and BatchNorm needs at least two; "
            "raise min-partition-size or lower validation-fraction"
        )
    model.train()
    for module in model.modules():
        if isinstance(module, _BatchNorm) and (fused_normalization or module not in moving):
            module.eval()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(
        trained, lr=learning_rate, momentum=momentum, weight_decay=weight_decay, fused=True
    )
    forward = compiled_forward(model) if compiled else model
    received = [p.detach().clone() for p in trained] if proximal_mu else []
    mean_loss, steps = math.nan, 0
    with own_random_state(generator.initial_seed(), x.device), compiler_errors():
        for epoch in itertools.count():
            if (epoch == epochs) if max_steps is None else (steps == max_steps):
                break
            total, seen = torch.zeros((), dtype=torch.float64, device=x.device), 0
            for index in shuffled_batches(len(x), batch_size, generator):
                rows = index.to(x.device)
                inputs = x[rows] if augment is None else augment(x[rows])
                with autocast(x.device, precision):
                    logits = forward(inputs)
                loss = criterion(logits.float(), y[rows])
                optimizer.zero_grad(set_to_none=True)
                loss.backward()  # type: ignore[no-untyped-call]
                if proximal_mu:
                    add_proximal_gradient(trained, received, proximal_mu)
                optimizer.step()
                # On the loss's device: fetching it would make a GPU wait in every step.
                total.add_(loss.detach(), alpha=len(index))
                seen += len(index)
                steps += 1
                if steps == max_steps:
                    break
            mean_loss = float(total) / seen
            if not math.isfinite(mean_loss):
                raise TrainingError(
                    f"the training loss turned non-finite in local epoch {epoch + 1}; "
                    "lower learning-rate or check the data for bad values"
                )
    if fused_normalization:
        measure_running_statistics(model, x, frozen)
    return TrainingResult(mean_loss, steps)


def add_proximal_gradient(
    parameters: list[nn.Parameter], received: list[Tensor], proximal_mu: float
) -> None:
    """Add mu (w - w_t), the gradient of (mu / 2) ||w - w_t||^2, to every parameter's gradient."""
    for parameter, anchor in zip(parameters, received, strict=True):
        if parameter.grad is not None:
            parameter.grad.add_(parameter.detach() - anchor, alpha=proximal_mu)


def freeze(model: nn.Module, names: Collection[str]) -> None:
    """Train all parameters but the named ones."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in names)


def moving_batchnorms(model: nn.Module, frozen: Collection[str]) -> dict[str, _BatchNorm]:
    """The BatchNorm layers, by name, whose running statistics are not frozen."""
    layers = {n: m for n, m in model.named_modules() if isinstance(m, _BatchNorm)}
    return {n: m for n, m in layers.items() if f"{n}.running_mean" not in frozen}


def shuffled_batches(count: int, batch_size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Index batches of one shuffled epoch; a single last index joins the previous batch."""
    order = torch.randperm(count, generator=generator)
    start = 0
    while start < count:
        end = start + batch_size
        if count - end == 1:
            end = count
        yield order[start:end]
        start = end


class Evaluation(NamedTuple):
    """Mean cross-entropy, accuracy, and accuracy with a label prior, the latter two in [0, 1]."""

    loss: float
    accuracy: float
    prior_accuracy: float


def evaluate(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    precision: str = "fp32",
    *,
    batch_statistics: bool = False,
) -> tuple[float, float]:
    """Mean cross-entropy and accuracy in [0, 1]; leaves the model in eval mode.

    ``precision`` is as in `train`. ``batch_statistics`` makes BatchNorm layers normalize with the
    statistics of each batch, as in training; it needs at least two examples.

    Raises
    ------
    TrainingError
        If there are no examples.
    """
    loss, correct = 0.0, 0
    for logits, labels in zip(
        logits_of(model, x, precision, batch_statistics=batch_statistics), _pieces(y), strict=True
    ):
        loss += float(F.cross_entropy(logits, labels, reduction="sum"))
        correct += int((logits.argmax(1) == labels).sum())
    return loss / len(x), correct / len(x)


def evaluate_with_prior(
    model: nn.Module, x: Tensor, y: Tensor, log_prior: Tensor, precision: str = "fp32"
) -> Evaluation:
    """As `evaluate`; beside it, the accuracy of argmax(logits + log_prior).

    ``log_prior`` (C,) is as `fedfusion_flwr.calibration.label_log_prior` gives it.
    """
    loss, correct, with_prior = 0.0, 0, 0
    log_prior = log_prior.to(x.device)
    for logits, labels in zip(logits_of(model, x, precision), _pieces(y), strict=True):
        loss += float(F.cross_entropy(logits, labels, reduction="sum"))
        correct += int((logits.argmax(1) == labels).sum())
        with_prior += int(((logits + log_prior).argmax(1) == labels).sum())
    return Evaluation(loss / len(x), correct / len(x), with_prior / len(x))


def logits_of(
    model: nn.Module, x: Tensor, precision: str = "fp32", *, batch_statistics: bool = False
) -> Iterator[Tensor]:
    """Float32 logits (n, C), part by part; arguments are as in `evaluate`."""
    if len(x) == 0:
        raise TrainingError("there are no examples to evaluate on")
    model.eval()
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.train(batch_statistics)
    for inputs in _pieces(x):
        with torch.inference_mode(), autocast(x.device, precision):
            logits = model(inputs).float()
        yield logits
    model.eval()


def _pieces(values: Tensor) -> Sequence[Tensor]:
    """Parts of nearly equal size, of at most `EVALUATION_BATCH`: never one example alone."""
    return torch.tensor_split(values, max(1, math.ceil(len(values) / EVALUATION_BATCH)))


def least_loss(
    model: nn.Module, states: Sequence[Mapping[str, Tensor]], x: Tensor, y: Tensor
) -> int:
    """Load the state of least loss on the examples and return its number; ties go to the first.

    No random number is drawn, and a loss that is not finite never wins. A state whose BatchNorm
    layers have seen no batch yet is evaluated with the statistics of the examples, as its own are
    meaningless.
    """
    losses = []
    for state in states:
        model.load_state_dict(state)
        untrained = any(
            not value.any() for key, value in state.items() if key.endswith("num_batches_tracked")
        )
        loss, _ = evaluate(model, x, y, batch_statistics=untrained and len(x) > 1)
        losses.append(loss if math.isfinite(loss) else math.inf)
    chosen = losses.index(min(losses))
    # Loading it again also undoes what evaluation with batch statistics left in the model.
    model.load_state_dict(states[chosen])
    return chosen


def measure_running_statistics(
    model: nn.Module, x: Tensor, frozen: Collection[str] = (), *, batch_statistics: bool = False
) -> None:
    """Set every BatchNorm's running statistics to the moments of its input on x, in one pass.

    Those named in ``frozen`` stay. While being measured, the layers normalize with their old
    statistics, as in training with fused normalization; with ``batch_statistics`` with those of
    each part of x, so that a layer's moments belong to the new statistics of the layers before it.
    Leaves the model in eval mode.
    """
    layers = moving_batchnorms(model, frozen)
    model.eval()
    for layer in layers.values():
        layer.train(batch_statistics)
    parts: Sequence[Tensor] = torch.split(x, EVALUATION_BATCH)
    if batch_statistics:
        # Every part is spread over all of x, whose order may be that of the classes.
        parts = [x[i :: len(parts)] for i in range(len(parts))]
    with collected_moments(layers) as moments, torch.no_grad():
        for rows in parts:
            model(rows)
    model.eval()
    for name, layer in layers.items():
        mean, variance = moments[name].result()
        unbiased = moments[name].count / max(moments[name].count - 1, 1)
        if isinstance(layer.running_mean, Tensor) and isinstance(layer.running_var, Tensor):
            layer.running_mean.copy_(mean)
            layer.running_var.copy_(variance * unbiased)
