# SPDX-License-Identifier: Apache-2.0
"""The perceptron's own arithmetic against torch's."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedfusion_flwr.fusion.perceptron import Perceptron


def perceptron(*widths: int, seed: int = 0) -> Perceptron:
    torch.manual_seed(seed)
    return Perceptron(*widths).double()


def test_one_layer_by_hand() -> None:
    """y = 2 x1 + 3 x2 + 1 at (1, 2) is 9; with gradient 5 by y: 5 x, 5, and by x 5 (2, 3)."""
    network = perceptron(2, 1)
    with torch.no_grad():
        network[0].weight.copy_(torch.tensor([[2.0, 3.0]]))
        network[0].bias.fill_(1)
    x = torch.tensor([[1.0, 2.0]], dtype=torch.float64).numpy()
    trace = network.trace(x)
    assert trace[-1].tolist() == [[9.0]]
    by_sums = network.backward(trace, 5 * torch.ones(1, 1, dtype=torch.float64).numpy())
    assert network[0].weight.grad.tolist() == [[5.0, 10.0]]
    assert network[0].bias.grad.tolist() == [5.0]
    assert network.by_input(by_sums).tolist() == [[10.0, 15.0]]


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(1, 7), min_size=2, max_size=5), st.integers(1, 9), st.integers(0, 1000))
def test_output_and_gradients_are_those_of_autograd(
    widths: list[int], rows: int, seed: int
) -> None:
    network = perceptron(*widths, seed=seed)
    x = torch.randn(rows, widths[0], dtype=torch.float64, requires_grad=True)
    by_output = torch.randn(rows, widths[-1], dtype=torch.float64)
    output = network(x)
    inputs = [x, *network.parameters()]
    expected = torch.autograd.grad(output, inputs, by_output)

    for _ in range(2):  # gradients are set, not added up
        trace = network.trace(x.detach().numpy())
        by_input = network.by_input(network.backward(trace, by_output.numpy()))
    torch.testing.assert_close(torch.as_tensor(trace[-1]), output.detach())
    found = [torch.as_tensor(by_input), *[p.grad for p in network.parameters()]]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("change", ["optimizer", "load"])
def test_computes_with_the_parameters_as_they_are_now(change: str) -> None:
    network, other = perceptron(3, 4, 2), perceptron(3, 4, 2, seed=1)
    x = torch.randn(5, 3, dtype=torch.float64)
    trace = network.trace(x.numpy())
    network.backward(trace, trace[-1])
    if change == "optimizer":
        torch.optim.Adam(network.parameters(), lr=0.1, fused=True).step()
    else:
        network.load_state_dict(other.state_dict())
    found = torch.as_tensor(network.trace(x.numpy())[-1])
    assert not torch.equal(found, torch.as_tensor(trace[-1]))
    torch.testing.assert_close(found, network(x).detach())
