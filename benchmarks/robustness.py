# SPDX-License-Identifier: Apache-2.0
"""What do hostile clients cost? Accuracy against their share, for ours and for Flower's own.

    python benchmarks/robustness.py            # runs what is missing, one process
    python benchmarks/robustness.py --table    # prints the Markdown table of the stored results

Every finished run is one row of ``benchmarks/results/robustness.jsonl``; a run that is there
already is not repeated. A run that its strategy gave up is a row too, and says why.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pandas import DataFrame

from benchmarks.attackers import ATTACKS, NONE, AttackedClients, choose_hostile
from benchmarks.in_process import Grid
from fedfusion_flwr.app.local import run_locally
from fedfusion_flwr.experiments.rows import Row, identity, read_rows

RESULTS = Path(__file__).parent / "results" / "robustness.jsonl"
SEEDS = (0, 1, 2)
SHARES = (0.2, 0.4, 0.1)
"""In the order in which they are run."""
CONFIG: dict[str, Any] = {
    "num-clients": 20,
    "num-server-rounds": 8,
    "partition": "components",
    "component-mixing": 0.5,
    "server-momentum": 0.0,
    "average-decay": 0.0,
    "fraction-evaluate": 0.0,
    "checkpoint-every": 0,
}
OURS: dict[str, dict[str, Any]] = {
    "FedFusion": {"strategy": "fedfusion"},
    "FedFusion robust": {"strategy": "fedfusion", "defence": "robust"},
    "FedAvg": {"strategy": "fedavg"},
}
STOCK = ("FedMedian", "Krum")
"""Strategies of ``flwr.serverapp.strategy``, as they are."""
METHODS = (*OURS, *STOCK)
BLATANT = ("nan", "huge")
"""Attacks that are refused or fatal at any share: run at one."""


def cells() -> list[tuple[str, float, str, int]]:
    """Every (attack, share, method, seed) of the table, in the order in which they are run."""
    attacked = [(NONE, 0.0)]
    for share in SHARES:
        attacked += [(a, share) for a in ATTACKS if a not in (NONE, *BLATANT)]
        attacked += [(a, share) for a in BLATANT if share == SHARES[0]]
    return [
        (attack, share, method, seed)
        for seed in SEEDS
        for attack, share in attacked
        for method in METHODS
    ]


def run_cell(attack: str, share: float, method: str, seed: int) -> Row:
    """Run one federation in this process."""
    from client_app import app

    about = identity()
    config = {**CONFIG, **OURS.get(method, {}), "seed": seed}
    hostile = choose_hostile(config["num-clients"], share, seed)
    clients = AttackedClients(app, attack, hostile, records=method in OURS)
    started = time.perf_counter()
    run = _run_ours if method in OURS else _run_stock
    result = run(method, config, clients, hostile)
    return {
        "config": config,
        "hostile": hostile,
        **result,
        "seconds": round(time.perf_counter() - started, 1),
        **about,
    }


def _run_ours(method: str, config: dict[str, Any], clients: Any, hostile: list[int]) -> Row:
    from fedfusion_flwr.federation.conversation import RunStopped

    stopped, digest = None, None
    with tempfile.TemporaryDirectory() as folder:
        try:
            digest = run_locally({**config, "output-dir": folder}, clients).digest
        except RunStopped as problem:
            stopped = str(problem)
        metrics = read_rows(Path(folder) / "metrics.jsonl")
        replies = read_rows(Path(folder) / "clients.jsonl")
    counted = {
        f"{what}-{who}": sum(
            what in _fate(row) and (row["client"] in hostile) == bad for row in replies
        )
        for what in ("dropped", "clipped")
        for who, bad in (("hostile", True), ("honest", False))
    }
    accuracy = [row["global-accuracy"] for row in metrics]
    return {"stopped": stopped, "accuracy": accuracy, "digest": digest, **counted}


def _fate(reply: Row) -> str:
    """What the defence did to a reply, in its own words."""
    return "dropped" if "dropped" in reply else str(reply.get("detail", ""))


def _run_stock(method: str, config: dict[str, Any], clients: Any, hostile: list[int]) -> Row:
    """As a user would; Krum is told the true number of attackers, its best case."""
    from flwr.app import ArrayRecord, MetricRecord
    from flwr.serverapp import strategy as flower

    from fedfusion_flwr import RunConfig, protocol
    from fedfusion_flwr.app.server import central_evaluation
    from fedfusion_flwr.data import data_for
    from fedfusion_flwr.federation.in_process_grid import InProcessGrid
    from fedfusion_flwr.models import model_for

    parsed = RunConfig.from_run_config(config)
    evaluate, accuracy = central_evaluation(parsed), []

    def evaluate_fn(server_round: int, arrays: ArrayRecord) -> MetricRecord | None:
        metrics = evaluate(server_round, arrays)
        accuracy.append(metrics["global-accuracy"])
        return None

    settings: dict[str, Any] = {"fraction_evaluate": 0.0, "min_available_nodes": 20}
    if method == "Krum":
        settings["num_malicious_nodes"] = len(hostile)
    model = model_for(parsed, data_for(parsed))
    stopped = None
    try:
        getattr(flower, method)(**settings).start(
            InProcessGrid(clients, parsed.num_clients, config),
            protocol.record_from_state(model.state_dict()),
            parsed.num_server_rounds,
            evaluate_fn=evaluate_fn,
        )
    except Exception as problem:  # noqa: BLE001 - that a run is given up is its result
        stopped = f"{type(problem).__name__}: {problem}".splitlines()[0]
    return {"stopped": stopped, "accuracy": accuracy}


def table() -> str:
    """Markdown: mean `last_accuracy` over seeds by attack and share; marked where a run stopped."""
    rows = DataFrame(read_rows(RESULTS))
    names = ["attack", "share", "method"]
    of_seeds = rows.assign(accuracy=[last_accuracy(row) for row in rows.to_dict("records")])
    of_seeds = of_seeds.groupby(names).agg(
        accuracy=("accuracy", "mean"), stopped=("stopped", "count"), seeds=("seed", "count")
    )
    mark = of_seeds["stopped"].gt(0).map({True: " (stopped)", False: ""})
    text = (of_seeds["accuracy"].map("{:.3f}".format) + mark).unstack().reindex(columns=METHODS)
    seeds = of_seeds["seeds"].unstack().reindex(columns=METHODS).fillna(0).astype(int)
    lines = [
        f"| attack | hostile | {' | '.join(METHODS)} | seeds |",
        "|---|---|" + "---|" * (len(METHODS) + 1),
    ]
    for case in dict.fromkeys((a, s) for a, s, _, _ in sorted(cells(), key=_shown)):
        if case in text.index:
            ends = dict.fromkeys((seeds.loc[case].min(), seeds.loc[case].max()))
            accuracies = " | ".join(text.loc[case].fillna(""))
            shown = " to ".join(map(str, ends))
            lines.append(f"| {case[0]} | {case[1]:.0%} | {accuracies} | {shown} |")
    return "\n".join(lines)


def _shown(cell: tuple[str, float, str, int]) -> tuple[int, float]:
    attack, share, _, _ = cell
    return list(ATTACKS).index(attack), share


def last_accuracy(row: Mapping[Any, Any]) -> float:
    """Mean accuracy of the last three rounds."""
    return statistics.mean(row["accuracy"][-3:])


if __name__ == "__main__":
    columns = {"attack": str, "share": float, "method": str, "seed": int}
    Grid(RESULTS, columns, cells(), run_cell).command_line(__doc__ or "", table)
