# SPDX-License-Identifier: Apache-2.0
"""What a client's process imports before it trains for the first time."""

from __future__ import annotations

import subprocess
import sys


def test_a_client_does_not_wait_for_the_libraries_of_the_server() -> None:
    """Those of inference, matching and pictures, beyond what Flower itself imports."""
    script = (
        "import sys, flwr.clientapp; before = set(sys.modules); import fedfusion_flwr.app.client;"
        "print(sorted({'scipy', 'sklearn', 'matplotlib', 'pandas'} & (set(sys.modules) - before)))"
    )
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
