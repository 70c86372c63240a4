# SPDX-License-Identifier: Apache-2.0
"""A Flower app as Flower's PyTorch quickstart has it, on the workload of the benchmarks.

FedAvg of Flower's own; clients that build the model anew for each message, and a DataLoader over
PIL images with torchvision transforms. Pictures are held as arrays and become PIL images when they
are asked for, as in torchvision's data sets. It knows one precision, fp32.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from benchmarks.workload import PICTURES, Workload, in_simulation
from fedfusion_flwr.models.lenet import LeNet

app = ClientApp()


class Pictures(Dataset[tuple[Tensor, int]]):
    """One client's pictures."""

    def __init__(self, pixels: np.ndarray, labels: np.ndarray) -> None:
        self.pixels, self.labels = pixels, labels
        self.transform = transforms.Compose(
            [transforms.ToTensor(), transforms.Normalize((0.5,), (0.5,))]
        )

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(Image.fromarray(self.pixels[index])), int(self.labels[index])


@functools.lru_cache
def _stored(path: str) -> tuple[np.ndarray, np.ndarray]:
    with np.load(path) as arrays:
        return arrays["x_train"], arrays["y_train"]


@app.train()
def train(message: Message, context: Context) -> Message:
    """One epoch on the client's share of the pictures."""
    settings: Any = message.content["config"]
    pixels, labels = _stored(settings["pictures"])
    share = slice(int(context.node_config["partition-id"]), None, settings["clients"])
    loader = DataLoader(
        Pictures(pixels[share], labels[share]), batch_size=settings["batch-size"], shuffle=True
    )
    model = LeNet((1, *pixels.shape[1:]), 10)
    received: Any = message.content["arrays"]
    model.load_state_dict(received.to_torch_state_dict())
    criterion = torch.nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9, weight_decay=1e-4)
    model.train()
    running_loss = 0.0
    for images, targets in loader:
        optimizer.zero_grad()
        loss = criterion(model(images), targets)
        loss.backward()
        optimizer.step()
        running_loss += loss.item()
    metrics = {"train_loss": running_loss / len(loader), "num-examples": len(loader.dataset)}
    content = RecordDict(
        {"arrays": ArrayRecord(model.state_dict()), "metrics": MetricRecord(metrics)}
    )
    return Message(content, reply_to=message)


def round_starts(work: Workload, folder: Path) -> list[float]:
    """Run it in Flower's simulation."""
    model = LeNet((1, work.side, work.side), 10)
    settings = {
        "pictures": str(folder / PICTURES),
        "clients": work.clients,
        "batch-size": work.batch,
    }

    def main(grid: Grid, context: Context) -> None:
        FedAvg(fraction_evaluate=0.0, min_available_nodes=work.clients).start(
            grid,
            ArrayRecord(model.state_dict()),
            num_rounds=work.rounds,
            train_config=ConfigRecord(settings),
        )

    return in_simulation(main, app, work)
