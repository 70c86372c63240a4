# SPDX-License-Identifier: Apache-2.0
"""What a client's process imports before its first training."""

from __future__ import annotations

import subprocess
import sys


def test_a_client_does_not_wait_for_the_libraries_of_the_server() -> None:
    """Its inference and its matching, that is; of Flower's own imports nothing is said."""
    script = (
        "import sys, flwr.clientapp; before = set(sys.modules); import fedfusion_flwr.app.client;"
        "print(sorted({'scipy', 'sklearn', 'matplotlib', 'pandas'} & (set(sys.modules) - before)))"
    )
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
