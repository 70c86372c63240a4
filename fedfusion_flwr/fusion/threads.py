# SPDX-License-Identifier: Apache-2.0
"""Sums that threads share depend on how many there are; what decides a model must not.

So no sum is shared: work is done by one thread, or cut into parts of a fixed size, each of which
one thread does.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch
from threadpoolctl import threadpool_limits

Part = TypeVar("Part")
Result = TypeVar("Result")


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute with one thread in torch, BLAS and OpenMP: equal bits on any number of cores.

    Small problems gain nothing from more threads anyway; large ones are for `side_by_side`.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with threadpool_limits(1):
            yield
    finally:
        torch.set_num_threads(before)


def side_by_side(work: Callable[[Part], Result], parts: Iterable[Part]) -> list[Result]:
    """Apply ``work`` to every part, on as many cores as there are; results in the parts' order.

    To be called within `one_thread`: threads that begin there compute alone, so that a part's bits
    do not depend on the number of cores. What is large is better written to its place in one tensor
    than returned: small results between large temporaries leave holes in the memory, a part each.
    """
    waiting = list(parts)
    threads = min(len(waiting), os.cpu_count() or 1)
    if threads < 2:
        return [work(part) for part in waiting]
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(work, waiting))


def pieces(length: int, size: int) -> list[slice]:
    """The range from 0 to ``length`` in slices of ``size``, the last one shorter."""
    return [slice(start, min(start + size, length)) for start in range(0, length, size)]
