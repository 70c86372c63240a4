# SPDX-License-Identifier: Apache-2.0
"""Sums that threads share depend on how many there are; what decides a model must not."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from threadpoolctl import threadpool_limits


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute with one thread in torch, BLAS and OpenMP: equal bits on any number of cores.

    For small problems only; they gain nothing from more threads anyway.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with threadpool_limits(1):
            yield
    finally:
        torch.set_num_threads(before)
