# SPDX-License-Identifier: Apache-2.0
"""FedFusion() in place of FedAvg() in a Flower app that knows nothing of this package."""

from __future__ import annotations

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAvg as FlowerFedAvg
from torch import nn

from fedfusion_flwr import FedFusion
from fedfusion_flwr.federation.in_process_grid import InProcessGrid

app = ClientApp()


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


def partition(context: Context) -> tuple[torch.Tensor, torch.Tensor]:
    """Three linear classes; half of the clients see shifted inputs."""
    identity = int(context.node_config["partition-id"])  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(identity)
    x = torch.randn(60, 4, generator=generator)
    return x + 3 * (identity % 2), x[:, :3].argmax(1)


def received(message: Message) -> Net:
    model = Net()
    model.load_state_dict(message.content["arrays"].to_torch_state_dict())
    return model


@app.train()
def train(message: Message, context: Context) -> Message:
    model = received(message)
    x, y = partition(context)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(10):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
    metrics = MetricRecord({"train_loss": loss.item(), "num-examples": len(x)})
    content = RecordDict({"arrays": ArrayRecord(model.state_dict()), "metrics": metrics})
    return Message(content=content, reply_to=message)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    model = received(message).eval()
    x, y = partition(context)
    with torch.no_grad():
        accuracy = (model(x).argmax(1) == y).float().mean().item()
    metrics = MetricRecord({"eval_acc": accuracy, "num-examples": len(x)})
    return Message(content=RecordDict({"metrics": metrics}), reply_to=message)


def run_app(strategy: FlowerFedAvg):
    torch.manual_seed(0)
    arrays, config = ArrayRecord(Net().state_dict()), ConfigRecord({"lr": 0.1})
    return strategy.start(InProcessGrid(app, 6), arrays, num_rounds=6, train_config=config)


def test_stock_app_runs_unchanged_and_learns() -> None:
    strategy = FedFusion(fraction_train=1.0, fraction_evaluate=0.5, min_available_nodes=6)
    result = run_app(strategy)
    assert sorted(result.train_metrics_clientapp) == [1, 2, 3, 4, 5, 6]
    losses = [result.train_metrics_clientapp[r]["train_loss"] for r in (1, 6)]
    assert losses[1] < losses[0]
    first, last = (result.evaluate_metrics_clientapp[r]["eval_acc"] for r in (1, 6))
    assert last > max(first, 0.7)
    # The state dict goes back into the user's own model, types and all.
    Net().load_state_dict(result.arrays.to_torch_state_dict())
    counter = result.arrays["layers.1.num_batches_tracked"].numpy()
    assert counter.dtype.name == "int64"
    assert counter == 60


def test_statistics_are_read_from_the_returned_state_dict() -> None:
    strategy = FedFusion(min_available_nodes=6, num_components=4)
    run_app(strategy)
    components = strategy.state.memory.assignments(list(range(6))).argmax(1).tolist()
    assert components[0::2] == [components[0]] * 3
    assert components[1::2] == [components[1]] * 3
    assert components[0] != components[1]


def test_with_one_component_parameters_equal_those_of_flowers_fedavg() -> None:
    ours = run_app(FedFusion(num_components=1, min_available_nodes=6)).arrays
    theirs = run_app(FlowerFedAvg(min_available_nodes=6)).arrays
    mine, other = ours.to_torch_state_dict(), theirs.to_torch_state_dict()
    for key in ("layers.0.weight", "layers.3.bias", "layers.1.running_mean"):
        torch.testing.assert_close(mine[key], other[key], rtol=1e-4, atol=1e-5)
    # Flower averages variances; moments keep the spread between the two kinds of clients.
    assert (mine["layers.1.running_var"] > other["layers.1.running_var"]).all()
