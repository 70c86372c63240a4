# SPDX-License-Identifier: Apache-2.0
"""FedProx: the proximal term, by its closed form and through the client."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fedfusion_flwr.app.training import add_proximal_gradient
from fedfusion_flwr.federation.bounds import squared_distance
from fedfusion_flwr.strategies import FedProx
from tests.strategies.planted import QUIET, PlantedClients, run_planted
from tests.strategies.small import initial_model, small_config, train_for_real


@pytest.mark.parametrize("mu", [0.0, 0.5, 4.0])
def test_optimum_of_a_quadratic(mu: float) -> None:
    """F = a/2 ||w - c||^2 near w_t has its optimum at (a c + mu w_t) / (a + mu)."""
    curvature, centre, anchor = 2.0, torch.tensor([3.0, -1.0]), torch.tensor([0.0, 1.0])
    w = nn.Parameter(anchor.clone())
    optimizer = torch.optim.SGD([w], lr=0.1)
    for _ in range(400):
        optimizer.zero_grad()
        (curvature / 2 * (w - centre).square().sum()).backward()  # type: ignore[no-untyped-call]
        add_proximal_gradient([w], [anchor], mu)
        optimizer.step()
    expected = (curvature * centre + mu * anchor) / (curvature + mu)
    torch.testing.assert_close(w.data, expected)


def test_gradient_is_that_of_one_squared_norm_over_all_tensors() -> None:
    """mu (w - w_t) in every tensor: a norm per tensor, or one not squared, would differ."""
    generator = torch.Generator().manual_seed(0)
    parameters = [nn.Parameter(torch.randn(n, generator=generator)) for n in (3, 5)]
    anchors = [torch.randn(n, generator=generator) for n in (3, 5)]
    term = sum((p - a).square().sum() for p, a in zip(parameters, anchors, strict=True))
    (0.7 / 2 * term).backward()  # type: ignore[union-attr]
    wanted = [p.grad.clone() for p in parameters]  # type: ignore[union-attr]
    for p in parameters:
        p.grad = torch.ones_like(p)
    add_proximal_gradient(parameters, anchors, 0.7)
    for p, expected in zip(parameters, wanted, strict=True):
        torch.testing.assert_close(p.grad, 1 + expected)
    frozen = nn.Parameter(torch.ones(2))
    add_proximal_gradient([frozen], [torch.zeros(2)], 0.7)
    assert frozen.grad is None


@pytest.mark.usefixtures("small")
def test_the_larger_mu_the_nearer_clients_stay() -> None:
    """Full-batch steps from one model; running statistics are not part of the distance."""
    distances = []
    for mu in (0.0, 0.01, 0.1, 1.0, 10.0):
        settings = {"batch_size": 99, "local_epochs": 10, "num_server_rounds": 1, "momentum": 0.0}
        config = small_config(strategy="fedprox", proximal_mu=mu, **settings)
        state, start = train_for_real(config).state, initial_model(config)
        distances.append(squared_distance(state, start))
    assert distances == sorted(distances, reverse=True)
    assert distances[0] > 1.2 * distances[-1] > 0


def test_clients_are_sent_mu_in_every_round() -> None:
    clients = PlantedClients()
    run_planted(FedProx(proximal_mu=0.25, **QUIET), clients, 2, rounds=2)
    assert [settings["proximal-mu"] for *_, settings in clients.sent] == [0.25] * 4
