# SPDX-License-Identifier: Apache-2.0
"""All randomness: generators derived from (seed, purpose, round, client), never a global one."""

from __future__ import annotations

import zlib

import numpy as np
import torch


def _sequence(seed: int, purpose: str, *keys: int) -> np.random.SeedSequence:
    return np.random.SeedSequence([seed, zlib.crc32(purpose.encode()), *keys])


def numpy_generator(seed: int, purpose: str, *keys: int) -> np.random.Generator:
    """A NumPy generator for one purpose, e.g. ``("sampling", round)``.

    A purpose must always come with the same number of keys: a trailing 0 has no effect.
    """
    return np.random.default_rng(_sequence(seed, purpose, *keys))


def derived_seed(seed: int, purpose: str, *keys: int) -> int:
    """A seed of 63 bits, for what takes a seed and no generator."""
    return int(_sequence(seed, purpose, *keys).generate_state(1, np.uint64)[0]) & (2**63 - 1)


def torch_generator(seed: int, purpose: str, *keys: int) -> torch.Generator:
    """The same for torch, on the CPU, so that every device draws the same numbers."""
    return torch.Generator().manual_seed(derived_seed(seed, purpose, *keys))
