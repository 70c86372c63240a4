# SPDX-License-Identifier: Apache-2.0
"""How fast do clients train, against a bare PyTorch loop and against DataLoader and transforms?

    python benchmarks/local_training.py [CASE ...] [--table]

Examples a second on one thread, one epoch of a client's examples, in four ways:

- client: the app's training function;
- bare loop: shuffled index batches of tensors in memory, the same model, memory format, precision
  and optimizer, and nothing else;
- DataLoader: torchvision transforms of each image and a DataLoader in the same process, as in
  Flower's PyTorch quickstart; images only.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.measuring import Columns, command_line, least_seconds
from fedfusion_flwr.app.training import train
from fedfusion_flwr.computation import autocast, compiled_forward, place_model
from fedfusion_flwr.experiments.rows import Row
from fedfusion_flwr.models import build_model
from fedfusion_flwr.models.bilstm import BiLSTM

RESULTS = Path(__file__).parent / "results" / "local_training.jsonl"
BATCH, REPEATS = 32, 4
SETTINGS = {"learning_rate": 0.02, "momentum": 0.9, "weight_decay": 1e-4}
CPU = torch.device("cpu")


def workload(name: str) -> tuple[nn.Module, Tensor, Tensor]:
    """A model with examples of the size of its data set."""
    generator = torch.Generator().manual_seed(0)
    if name == "bilstm":
        x = torch.randint(2, 20_000, (640, 40), generator=generator)
        return BiLSTM(20_000, 2), x, torch.randint(2, (640,), generator=generator)
    shape, count = ((1, 28, 28), 1920) if name == "lenet" else ((3, 32, 32), 160)
    x = torch.rand(count, *shape, generator=generator)
    y = torch.randint(10, (count,), generator=generator)
    return place_model(build_model(name, shape, 10, seed=0), CPU), x, y


def bare_loop(
    model: nn.Module, forward: Callable[[Tensor], Tensor], x: Tensor, y: Tensor, precision: str
) -> None:
    model.train()
    optimizer = torch.optim.SGD(
        model.parameters(), lr=0.02, momentum=0.9, weight_decay=1e-4, fused=True
    )
    for rows in torch.randperm(len(x)).split(BATCH):
        with autocast(CPU, precision):
            logits = forward(x[rows])
        loss = F.cross_entropy(logits.float(), y[rows])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()


def loader_loop(model: nn.Module, x: Tensor, y: Tensor) -> None:
    from torchvision import transforms

    class Pictures(torch.utils.data.Dataset[Any]):
        def __init__(self) -> None:
            self.images = [transforms.functional.to_pil_image(image) for image in x]
            middle = (0.5,) * x.shape[1]
            self.transform = transforms.Compose(
                [transforms.ToTensor(), transforms.Normalize(middle, middle)]
            )

        def __len__(self) -> int:
            return len(self.images)

        def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
            return self.transform(self.images[index]), y[index]

    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9, weight_decay=1e-4)
    for images, labels in torch.utils.data.DataLoader(Pictures(), BATCH, shuffle=True):
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()


def measure(name: str, precision: str, compiled: bool) -> Row:
    """One case; each way takes turns with the others."""
    torch.set_num_threads(1)
    model, x, y = workload(name)
    forward = compiled_forward(model) if compiled else model
    generator = torch.Generator().manual_seed(0)

    def client() -> None:
        train(
            model,
            x,
            y,
            epochs=1,
            batch_size=BATCH,
            generator=generator,
            precision=precision,
            compiled=compiled,
            **SETTINGS,
        )

    ways: dict[str, Callable[[], object]] = {
        "client": client,
        "bare-loop": lambda: bare_loop(model, forward, x, y, precision),
    }
    if name != "bilstm" and precision == "fp32" and not compiled:
        plain = build_model(name, tuple(x.shape[1:]), 10, seed=0)
        ways["data-loader"] = lambda: loader_loop(plain, x, y)
    spent = least_seconds(ways, REPEATS)
    return {"examples-per-second": {way: len(x) / value for way, value in spent.items()}}


CASES = {
    f"{name}, {precision}{', compiled' if compiled else ''}": functools.partial(
        measure, name, precision, compiled
    )
    for name in ("lenet", "resnet18", "bilstm")
    for precision in ("fp32", "bf16")
    for compiled in (False, True)
    if name == "lenet" or not compiled
}


def _rate(way: str) -> Callable[[Row], str]:
    def rate(row: Row) -> str:
        found = row["examples-per-second"].get(way)
        return "" if found is None else f"{found:,.0f}"

    return rate


def _to_bare(row: Row) -> str:
    rates = row["examples-per-second"]
    return f"{rates['client'] / rates['bare-loop']:.2f}"


COLUMNS: Columns = {
    "client, examples/s": _rate("client"),
    "bare loop": _rate("bare-loop"),
    "DataLoader": _rate("data-loader"),
    "client to bare loop": _to_bare,
}

if __name__ == "__main__":
    command_line(__doc__ or "", RESULTS, CASES, COLUMNS)
