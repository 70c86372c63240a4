# SPDX-License-Identifier: Apache-2.0
"""Work is shared among cores without a trace in the bits."""

from __future__ import annotations

import os
import threading

import pytest
import torch

from fedfusion_flwr.fusion import DistributionInference, FusionPosterior
from fedfusion_flwr.fusion.threads import one_thread, side_by_side


@pytest.mark.parametrize("cores", [1, 2, None])
def test_results_keep_the_order_of_the_parts(
    cores: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    assert side_by_side(lambda part: part * part, range(5)) == [0, 1, 4, 9, 16]
    assert side_by_side(lambda part: part, []) == []


def test_parts_are_done_on_several_cores_by_one_thread_each(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    both = threading.Barrier(2, timeout=60)  # passed only if two parts are under way at once

    def work(_: int) -> int:
        both.wait()
        return torch.get_num_threads()

    before = torch.get_num_threads()
    with one_thread():
        assert side_by_side(work, range(2)) == [1, 1]
    assert torch.get_num_threads() == before


def test_an_error_in_a_part_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    with pytest.raises(ZeroDivisionError):
        side_by_side(lambda part: 1 / part, [1, 0, 2])


def test_wide_inference_has_the_same_bits_on_any_number_of_cores(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """600 clients are ten parts of rows, 1,300 statistics are eleven parts of columns."""
    generator = torch.Generator().manual_seed(0)
    groups = 3 * torch.randn(3, 1300, generator=generator)
    x = groups[torch.arange(600) % 3] + torch.randn(600, 1300, generator=generator)

    def posterior(cores: int) -> FusionPosterior:
        monkeypatch.setattr(os, "cpu_count", lambda: cores)
        inference = DistributionInference(4, seed=0, steps=5)
        return inference.fit(x, torch.full((600,), 10))

    alone, shared = posterior(1), posterior(3)
    assert torch.equal(alone.assignments, shared.assignments)
    assert torch.equal(alone.mixture, shared.mixture)
    assert torch.equal(alone.components, shared.components)
    assert alone.elbo == shared.elbo
