# SPDX-License-Identifier: Apache-2.0
"""What every row says of the run that made it."""

from __future__ import annotations

import platform

import torch

from fedfusion_flwr.experiments.rows import identity


def test_the_machine_is_told_with_its_instructions() -> None:
    about = identity()
    assert (
        f"{platform.machine()} with {torch.backends.cpu.get_cpu_capability()}" in about["machine"]
    )
    assert about["torch"] == torch.__version__
    assert about["commit"]
