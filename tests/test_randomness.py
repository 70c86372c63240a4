# SPDX-License-Identifier: Apache-2.0
"""Generators depend on seed, purpose and keys, and on nothing else."""

from __future__ import annotations

import itertools

import numpy as np
import torch

from fedfusion_flwr import RunConfig
from fedfusion_flwr.data import data_for
from fedfusion_flwr.models import model_for
from fedfusion_flwr.randomness import numpy_generator, torch_generator

STREAMS = list(itertools.product((0, 1, 2**63 - 1), ("sampling", "training"), (1, 2), (0, 1, 7)))


def test_equal_keys_give_equal_streams() -> None:
    for seed, purpose, *keys in STREAMS:
        first, again = (numpy_generator(seed, purpose, *keys).random(4) for _ in range(2))
        assert np.array_equal(first, again)
        one, two = (torch.rand(4, generator=torch_generator(seed, purpose, *keys)) for _ in "ab")
        assert torch.equal(one, two)


def test_different_keys_give_different_streams() -> None:
    numpy_draws = {numpy_generator(*stream).integers(2**63) for stream in STREAMS}
    torch_seeds = {torch_generator(*stream).initial_seed() for stream in STREAMS}
    assert len(numpy_draws) == len(torch_seeds) == len(STREAMS)


def test_values_are_the_same_on_every_machine() -> None:
    # Recorded once: a change here changes every published run.
    assert numpy_generator(0, "sampling", 1).integers(1000, size=3).tolist() == [472, 371, 655]
    generator = torch_generator(0, "training", 1, 2)
    assert torch.randperm(6, generator=generator).tolist() == [1, 4, 5, 2, 3, 0]


def test_global_generators_are_neither_read_nor_written() -> None:
    np.random.seed(1)  # noqa: NPY002 - the global generator must not matter
    torch.manual_seed(1)
    numpy_state = np.random.get_state()[1].copy()  # noqa: NPY002
    torch_state = torch.get_rng_state()
    first = numpy_generator(3, "x").random(), torch_generator(3, "x").initial_seed()
    assert np.array_equal(np.random.get_state()[1], numpy_state)  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), torch_state)
    np.random.seed(2)  # noqa: NPY002
    torch.manual_seed(2)
    assert (numpy_generator(3, "x").random(), torch_generator(3, "x").initial_seed()) == first


def test_generators_stay_on_the_cpu() -> None:
    assert torch_generator(0, "training").device == torch.device("cpu")


def test_no_two_initial_models_of_any_two_seeds_are_equal() -> None:
    """The models of IFCA's clusters and FedMA's clients: seed 0's second is not seed 1's first."""
    data = data_for(RunConfig())
    firsts = {
        float(model_for(RunConfig(seed=seed), data, number).features[0][0].weight.flatten()[0])
        for seed in range(3)
        for number in range(6)
    }
    assert len(firsts) == 18
