# SPDX-License-Identifier: Apache-2.0
"""One federated run of a suite, and its row."""

from __future__ import annotations

import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from fedfusion_flwr.app.local import run_locally
from fedfusion_flwr.experiments.results import compact
from fedfusion_flwr.experiments.rows import Row, identity, read_rows


def run_cell(
    config: dict[str, Any],
    engine: str,
    cpus: int,
    gpus: float,
    references: Sequence[Mapping[str, Any]] = (),
    drawn: str | None = None,
    served: bool = False,
) -> Row:
    """Run one federation; what its row has beside the cell's factors.

    Parameters
    ----------
    config : dict[str, Value]
        Run-config overrides, ``output-dir`` among them.
    engine : {"simulation", "in-process"}
        Flower's simulation, Ray and all, or all clients in turn in this process. The numbers are
        the same.
    cpus : int
        simulation: CPUs that Ray may use.
    gpus : float
        simulation: share of a GPU for each client.
    references : sequence of Mapping
        Models trained on the pooled data to compare with, see `bias.measure_bias`; without any,
        feature bias is not measured.
    drawn : str or None
        File for what is drawn of the run's inference; None keeps nothing, nor the running values
        that are drawn of its model.
    served : bool
        Whether to score what each client is served, see `served.measure_served`.
    """
    about = {**identity(), "engine": engine}
    started = time.perf_counter()
    outcome = run_locally(config, engine=engine, cpus=cpus, gpus=gpus)
    row: Row = {
        "metrics": compact(read_rows(outcome.directory / "metrics.jsonl")),
        "digest": outcome.digest,
        "seconds": round(time.perf_counter() - started, 1),
        **about,
    }
    # Here, not above: what is measured at the end takes long to import.
    if references:
        from fedfusion_flwr.experiments.bias import measure_bias

        state = load_file(outcome.directory / "final_model.safetensors")
        row["bias"] = measure_bias(config, state, references, drawn is not None)
    if served:
        from fedfusion_flwr.experiments.served import measure_served

        row["served"] = measure_served(config, outcome.strategy)
    if drawn is not None:
        from fedfusion_flwr.experiments.inferred import keep_inferred

        try:
            keep_inferred(outcome.directory, Path(drawn), outcome.digest)
        except Exception:  # noqa: BLE001 - a run of hours is not lost for a picture
            traceback.print_exc()
    return row
