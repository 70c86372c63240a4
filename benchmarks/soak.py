# SPDX-License-Identifier: Apache-2.0
"""A long run with clients that often fail: is its memory flat, and every round accounted for?

    python benchmarks/soak.py           # 200 rounds, 50 clients; if not stored yet
    python benchmarks/soak.py --table   # prints the stored results

In this process, so that the memory measured is that of the server and of all clients together; on
small pictures that are made up, as length and failures are what matters. A client that is asked
fails with probability 0.1: it raises, does not answer, or sends NaN, each in a third of the cases.
At the end the run is resumed from its last checkpoint for one round more.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from flwr.app import Context, Message, MessageType, MetricRecord, RecordDict

from benchmarks.in_process import write_pictures
from benchmarks.measuring import resident_bytes
from client_app import app
from fedfusion_flwr import protocol
from fedfusion_flwr.app.server import RunOutcome, run
from fedfusion_flwr.experiments.rows import Row, append_row, identity, read_rows
from fedfusion_flwr.federation.in_process_grid import InProcessGrid
from fedfusion_flwr.randomness import numpy_generator

RESULTS = Path(__file__).parent / "results" / "soak.jsonl"
CONFIG: dict[str, Any] = {
    "seed": 0,
    "num-server-rounds": 200,
    "num-clients": 50,
    "dataset": "npz",
    "partition": "shards",
    "validation-fraction": 0.2,
    "vae-steps": 30,
    "vae-refit-steps": 5,
}
EXAMPLES_PER_CLIENT = 20
FAILURES = ("error", "missing", "nonfinite")
"""How a client fails, by the reason that its reply is dropped for."""
PROBABILITY = 0.1
FLAT = 0.05
"""Memory is flat if its median over the last quarter of the rounds is above that over the second
quarter by no more than this share; the first quarter fills caches and the allocator's pools."""


def failure_of(seed: int, message: Message, partition: int) -> str | None:
    """How the client fails this time, if it does; drawn for each message."""
    server_round = message.content.config_records[protocol.CONFIG][protocol.SERVER_ROUND]
    purpose = f"soak-{message.metadata.message_type}"
    generator = numpy_generator(seed, purpose, int(server_round), partition)
    return str(generator.choice(FAILURES)) if generator.random() < PROBABILITY else None


class CarelessGrid(InProcessGrid):
    """A federation whose clients fail; notes the process's memory at every exchange."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__(self._careless, config["num-clients"], config, shuffle_replies=True)
        self.seed: int = config["seed"]
        self.planned: Counter[tuple[str, str]] = Counter()
        self.megabytes: list[float] = []

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Send to those who answer at all."""
        answered, messages = [], list(messages)
        for message in messages:
            partition = self.contexts[message.metadata.dst_node_id].node_config["partition-id"]
            failure = failure_of(self.seed, message, int(partition))
            if failure:
                self.planned[message.metadata.message_type, failure] += 1
            if failure != "missing":
                answered.append(message)
        if messages and messages[0].metadata.message_type == MessageType.TRAIN:
            self.megabytes.append(resident_bytes() / 2**20)
        return super().send_and_receive(answered, timeout=timeout)

    def _careless(self, message: Message, context: Context) -> Message:
        failure = failure_of(self.seed, message, int(context.node_config["partition-id"]))
        if failure == "error":
            raise RuntimeError("this client fails on purpose")
        reply = app(message, context)
        if failure == "nonfinite":
            spoil(reply)
        return reply


def spoil(reply: Message) -> None:
    """Put a NaN into the model of a reply, or into its metrics where it holds no model."""
    if protocol.ARRAYS in reply.content.array_records:
        state = protocol.state_from_record(reply.content.array_records[protocol.ARRAYS])
        key = next(iter(state))
        state[key] = torch.full_like(state[key], math.nan)
        reply.content[protocol.ARRAYS] = protocol.record_from_state(state)
    else:
        metrics = dict(reply.content.metric_records[protocol.METRICS])
        reply.content[protocol.METRICS] = MetricRecord({**metrics, "personalized-loss": math.nan})


def soak(config: dict[str, Any]) -> Row:
    """Run, check the books, go on for a round; the row of the results."""
    about = identity()
    with tempfile.TemporaryDirectory() as name:
        examples = EXAMPLES_PER_CLIENT * config["num-clients"]
        data = {"data-root": str(write_pictures(Path(name) / "pictures.npz", examples))}
        grid = CarelessGrid({**config, **data, "output-dir": f"{name}/run"})
        started = time.perf_counter()
        outcome = start(grid)
        seconds = time.perf_counter() - started
        metrics = read_rows(outcome.directory / "metrics.jsonl")
        longer = {
            **config,
            **data,
            "resume-from": f"{name}/run",
            "num-server-rounds": config["num-server-rounds"] + 1,
        }
        resumed = start(CarelessGrid(longer))
        last = read_rows(resumed.directory / "metrics.jsonl")[-1]["round"]
    # The exchanges of training only, one a round.
    by_round = grid.megabytes
    return {
        "config": config,
        "accounts": accounts(metrics, grid.planned),
        "memory": memory(by_round),
        "megabytes": [round(value, 1) for value in by_round],
        "final-accuracy": metrics[-1]["global-accuracy"],
        "resumed-to-round": last,
        "digest": outcome.digest,
        "seconds": round(seconds, 1),
        **about,
    }


def start(grid: CarelessGrid) -> RunOutcome:
    """One run, or the rest of one."""
    return run(grid, Context(1, 0, {}, RecordDict(), grid.run_config))


def accounts(metrics: list[Row], planned: Counter[tuple[str, str]]) -> Row:
    """What the run has written of its replies, and how many rounds' books balance."""
    rounds = metrics[1:]
    reasons: Counter[str] = Counter()
    balanced = 0
    for row in rounds:
        of_round = {
            key.removeprefix("dropped-"): int(value)
            for key, value in row.items()
            if key.startswith("dropped-")
        }
        reasons.update(of_round)
        valid, dropped = row["replies-valid"], row["replies-dropped"]
        balanced += row["clients-sampled"] == valid + dropped == valid + sum(of_round.values())
    return {
        "rounds": len(rounds),
        "rounds-balanced": balanced,
        "sampled": sum(row["clients-sampled"] for row in rounds),
        "valid": int(sum(row["replies-valid"] for row in rounds)),
        "dropped": dict(sorted(reasons.items())),
        "planned": {reason: planned["train", reason] for reason in FAILURES},
        "evaluations-valid": int(sum(row.get("evaluate-replies-valid", 0) for row in rounds)),
        "evaluations-dropped": int(sum(row.get("evaluate-replies-dropped", 0) for row in rounds)),
        "evaluations-planned": sum(planned["evaluate", reason] for reason in FAILURES),
    }


def memory(megabytes: list[float]) -> Row:
    """Medians of the second and of the last quarter of the rounds, and whether that is flat."""
    quarter = len(megabytes) // 4
    early = statistics.median(megabytes[quarter : 2 * quarter])
    late = statistics.median(megabytes[-quarter:])
    return {
        "second-quarter": round(early, 1),
        "last-quarter": round(late, 1),
        "flat": late <= (1 + FLAT) * early,
    }


def sentence() -> str:
    """What docs/deploy.md says of the stored soak."""
    (row,) = read_rows(RESULTS)
    books, used = row["accounts"], row["memory"]
    dropped = ", ".join(f"{count} {reason}" for reason, count in books["dropped"].items())
    return (
        f"{books['rounds']} rounds with {row['config']['num-clients']} clients took "
        f"{row['seconds'] / 60:.1f} minutes: {books['sampled']} trainings asked for, "
        f"{books['valid']} replies valid, dropped {dropped}; the books of "
        f"{books['rounds-balanced']} rounds balance. Memory in the median: "
        f"{used['second-quarter']:.0f} MiB in the second quarter of the rounds, "
        f"{used['last-quarter']:.0f} MiB in the last."
    )


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--table", action="store_true", help="only print the stored result")
    if not parser.parse_args().table and not read_rows(RESULTS):
        append_row(RESULTS, soak(CONFIG))
    print(sentence())
    print(json.dumps({k: v for k, v in read_rows(RESULTS)[0].items() if k != "megabytes"}))


if __name__ == "__main__":
    main()
