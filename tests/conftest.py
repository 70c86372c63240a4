# SPDX-License-Identifier: Apache-2.0
"""Settings of the whole suite; read before any test imports torch."""

import os

workers = os.environ.get("PYTEST_XDIST_WORKER_COUNT")
if workers is not None:
    # torch takes all cores in each worker otherwise, and the workers wait for each other's threads.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // int(workers))))
