# SPDX-License-Identifier: Apache-2.0
"""Does bfloat16 pay on this machine's processor?

    python benchmarks/precision.py [CASE ...] [--table]

Seconds of one training step of 32 examples on one thread, in fp32 and in bf16. Where the processor
has no bfloat16 arithmetic (`has_bfloat16`) it takes minutes.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch

from benchmarks.local_training import BATCH, CPU, bare_loop, workload
from benchmarks.measuring import Columns, command_line, least_seconds
from fedfusion_flwr.computation import has_bfloat16
from fedfusion_flwr.experiments.rows import Row

RESULTS = Path(__file__).parent / "results" / "precision.jsonl"
PRECISIONS = ("fp32", "bf16")
REPEATS = {"lenet": 20, "bilstm": 20, "resnet18": 1, "mobilenetv2": 1}


def measure(name: str) -> Row:
    """One model; the precisions take turns, and the first turn does not count."""
    torch.set_num_threads(1)
    model, x, y = workload(name)
    steps: dict[str, Any] = {
        precision: functools.partial(bare_loop, model, model, x[:BATCH], y[:BATCH], precision)
        for precision in PRECISIONS
    }
    return {
        "seconds": least_seconds(steps, REPEATS[name]),
        "bfloat16": has_bfloat16(CPU),
        "instructions": torch.backends.cpu.get_cpu_capability(),
    }


CASES = {name: functools.partial(measure, name) for name in REPEATS}
COLUMNS: Columns = {
    "instructions": lambda row: row["instructions"],
    "bfloat16 arithmetic": lambda row: "yes" if row["bfloat16"] else "no",
    "fp32, s": lambda row: f"{row['seconds']['fp32']:.3f}",
    "bf16, s": lambda row: f"{row['seconds']['bf16']:.3f}",
    "bf16 to fp32": lambda row: f"{row['seconds']['bf16'] / row['seconds']['fp32']:.1f}",
}

if __name__ == "__main__":
    command_line(__doc__ or "", RESULTS, CASES, COLUMNS)
