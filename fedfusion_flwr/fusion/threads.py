# SPDX-License-Identifier: Apache-2.0
"""Equal bits on any number of cores.

A sum that threads share depends on their number. So no sum is shared: work is done by one thread,
or cut into parts of a fixed size, each done by one thread.
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
    """Compute with one thread in torch, BLAS and OpenMP.

    Small problems gain nothing from more threads; for large ones there is `side_by_side`.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with threadpool_limits(1):
            yield
    finally:
        torch.set_num_threads(before)


def side_by_side(work: Callable[[Part], Result], parts: Iterable[Part]) -> list[Result]:
    """Apply ``work`` to every part, on all cores; results in the order of the parts.

    Call it within `one_thread`: threads started there compute alone, so that a part's bits do not
    depend on the number of cores. Write large results to their place in one tensor instead of
    returning them: results between large temporaries fragment the memory.
    """
    waiting = list(parts)
    threads = min(len(waiting), os.cpu_count() or 1)
    if threads < 2:
        return [work(part) for part in waiting]
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(work, waiting))


def pieces(length: int, size: int) -> list[slice]:
    """Slices of ``size`` that cover the range from 0 to ``length``; the last can be shorter."""
    return [slice(start, min(start + size, length)) for start in range(0, length, size)]
