# SPDX-License-Identifier: Apache-2.0
"""How do inference's time, memory and quality grow with clients K and statistics D?

    python benchmarks/inference_scale.py [CASE ...] [--table]

Five planted components of equal size, noise of 0.8 standard deviations of their centres. A fit from
scratch, then re-fits on statistics that moved a little, as in later rounds.
"""

from __future__ import annotations

import functools
from pathlib import Path

import torch
from sklearn.metrics import adjusted_rand_score

from benchmarks.measuring import Columns, PeakMemory, command_line, seconds
from fedfusion_flwr.experiments.rows import Row
from fedfusion_flwr.fusion import DistributionInference, FusionPosterior

RESULTS = Path(__file__).parent / "results" / "inference_scale.jsonl"
COMPONENTS, NOISE, DRIFT, REFITS = 5, 0.8, 0.05, 3
SIZES = [(clients, 192) for clients in (10, 100, 1_000, 10_000)] + [
    (10, 19_200),
    (100, 19_200),
    (1_000, 19_200),
    (10_000, 19_200),
    (100, 38_400),
    (1_000, 38_400),
]


def measure(clients: int, width: int) -> Row:
    """One case; memory is what fits add at their peak to the statistics themselves."""
    generator = torch.Generator().manual_seed(0)
    centers = torch.randn(COMPONENTS, width, generator=generator)
    labels = torch.randperm(clients, generator=generator) % COMPONENTS
    x = centers[labels]
    for row in x:
        row += NOISE * torch.randn(width, generator=generator)
    examples = torch.full((clients,), 100)
    inference = DistributionInference(8, seed=0)
    spent: list[float] = []
    posteriors: list[FusionPosterior] = []

    def fit() -> None:
        posteriors.append(inference.fit(x, examples))

    with PeakMemory() as peak:
        for _ in range(1 + REFITS):
            spent.append(seconds(fit))
            x.add_(DRIFT * torch.randn(1, width, generator=generator))
    found = posteriors[-1].assignments.argmax(1)
    return {
        "clients": clients,
        "statistics": width,
        "first-fit-seconds": spent[0],
        "refit-seconds": min(spent[1:]),
        "extra-bytes": peak.grown,
        "statistics-bytes": x.nbytes,
        "adjusted-rand-index": adjusted_rand_score(labels, found),
    }


CASES = {
    f"K = {clients:,}, D = {width:,}": functools.partial(measure, clients, width)
    for clients, width in SIZES
}
COLUMNS: Columns = {
    "first fit, s": lambda row: f"{row['first-fit-seconds']:.2f}",
    "re-fit, s": lambda row: f"{row['refit-seconds']:.2f}",
    "re-fit, ms a client": lambda row: f"{1e3 * row['refit-seconds'] / row['clients']:.2f}",
    "extra memory, MB": lambda row: f"{row['extra-bytes'] / 1e6:.0f}",
    "statistics, MB": lambda row: f"{row['statistics-bytes'] / 1e6:.0f}",
    "adjusted Rand index": lambda row: f"{row['adjusted-rand-index']:.2f}",
}

if __name__ == "__main__":
    command_line(__doc__ or "", RESULTS, CASES, COLUMNS)
