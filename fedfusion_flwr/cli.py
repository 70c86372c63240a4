# SPDX-License-Identifier: Apache-2.0
"""The console script: ``fedfusion compare``, ``fedfusion report`` and ``fedfusion centralized``."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from fedfusion_flwr.errors import FedFusionError

_INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; 1 if something failed, 2 and one sentence if the command was wrong."""
    options = _parser().parse_args(arguments)
    # As with `python -m`: the user's own "module:Class" may lie in the working directory.
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        return int(options.run(options))
    except (FedFusionError, OSError) as problem:
        print(f"error: {problem}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: the same command goes on where this one stopped", file=sys.stderr)
        return _INTERRUPTED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="fedfusion", description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    compare = commands.add_parser("compare", help="run a suite of runs and make its tables")
    compare.set_defaults(run=_compare)
    shipped = "quick, small, method, paper, deep, or the path of your own .toml file"
    compare.add_argument("suite", help=shipped)
    _add_output(compare, "results/<name of the suite>")
    _add_data_root(compare)
    compare.add_argument(
        "--engine",
        choices=("simulation", "in-process"),
        default="simulation",
        help="Flower's simulation (Ray), or one process a run: the same numbers, cheaper on small "
        "machines",
    )
    compare.add_argument("--workers", type=int, help="runs side by side; default: as cores allow")
    compare.add_argument("--gpus-per-client", type=float, default=0.0, help="simulation: of Ray")
    compare.add_argument("--group", action="append", default=[], help="run only this group")
    mode = compare.add_mutually_exclusive_group()
    mode.add_argument("--dry-run", action="store_true", help="say what there is to do, do nothing")
    mode.add_argument("--tune", action="store_true", help="only tune, and show what won")
    mode.add_argument("--tables", action="store_true", help="only make the tables anew")

    report = commands.add_parser("report", help="make figures and a page of a run or a suite")
    report.set_defaults(run=_report)
    report.add_argument("path", type=Path, help="a run directory, or the folder of a suite")
    report.add_argument("--output", type=Path, help="folder of the report; default: beside it")

    centralized = commands.add_parser(
        "centralized", help="train the reference model on the pooled data"
    )
    centralized.set_defaults(run=_centralized)
    centralized.add_argument("--dataset", required=True)
    centralized.add_argument("--model", required=True)
    centralized.add_argument(
        "--steps", type=int, help="gradient steps; default: those of the federated run"
    )
    centralized.add_argument("--seed", type=int, default=0, help="of the model and the data")
    centralized.add_argument("--batch-seed", type=int, default=0, help="of the batches' order")
    centralized.add_argument(
        "--run-config", action="append", default=[], help="keys as for flwr run: 'batch-size=64'"
    )
    _add_output(centralized, "results/centralized")
    _add_data_root(centralized)
    return parser


def _add_output(parser: argparse.ArgumentParser, default: str) -> None:
    parser.add_argument("--output", type=Path, help=f"folder; default: {default}")


def _add_data_root(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--data-root",
        type=_root,
        action="append",
        default=[],
        metavar="DATASET=PATH",
        help="where the files of a data set lie; once for each",
    )


def _root(argument: str) -> tuple[str, str]:
    name, equals, path = argument.partition("=")
    if not (equals and name and path):
        raise argparse.ArgumentTypeError(f"{argument!r} is not DATASET=PATH")
    if not Path(path).expanduser().exists():
        raise argparse.ArgumentTypeError(f"there is no '{path}'")
    return name, str(Path(path).expanduser().resolve())


def _compare(options: argparse.Namespace) -> int:
    # Here and not above, as in all commands: --help should not wait for torch.
    from fedfusion_flwr.experiments.compare import Comparison
    from fedfusion_flwr.experiments.jobs import interrupted_by_sigterm, locked
    from fedfusion_flwr.experiments.suite import load_suite
    from fedfusion_flwr.experiments.tables import TITLES, markdown, write_tables
    from fedfusion_flwr.experiments.work import Machine

    suite = load_suite(options.suite)
    suite.check_data_roots(name for name, _ in options.data_root)
    cores = os.cpu_count() or 1
    workers = options.workers or (cores if options.engine == "in-process" else 1)
    machine = Machine(
        options.output or Path("results", suite.name),
        options.engine,
        max(cores // workers, 1),
        options.gpus_per_client,
        dict(options.data_root),
    )
    comparison = Comparison(suite, machine, workers, options.group)
    if options.dry_run:
        print(comparison.plan())
        return 0
    failed = 0
    with locked(machine.folder), interrupted_by_sigterm():
        if options.tune:
            failed = comparison.tune()
        elif not options.tables:
            print(comparison.plan(), flush=True)
            failed = comparison.run()
        tuning = comparison.tuning_table()
        write_tables(machine.folder, comparison.rows(), tuning)
    if options.tune and not tuning.empty:
        print(f"{TITLES['tuning']}\n\n{markdown(tuning)}")
    print(f"tables: {machine.folder / 'tables'}")
    if failed:
        print(
            f"{failed} cells failed, see {machine.folder / 'failures.jsonl'}; "
            "the same command tries them again",
            file=sys.stderr,
        )
    return int(failed > 0)


def _report(options: argparse.Namespace) -> int:
    from fedfusion_flwr.experiments.page import write_report

    print(write_report(options.path, options.output))
    return 0


def _centralized(options: argparse.Namespace) -> int:
    from fedfusion_flwr.experiments.centralized import train_centralized
    from fedfusion_flwr.experiments.results import CENTRALIZED
    from fedfusion_flwr.experiments.rows import put_row
    from fedfusion_flwr.experiments.work import Machine, Work
    from fedfusion_flwr.overrides import parse_overrides

    config = {
        **parse_overrides(options.run_config),
        "dataset": options.dataset,
        "model": options.model,
        "seed": options.seed,
    }
    reference = Work(
        group=CENTRALIZED,
        dataset=options.dataset,
        model=options.model,
        seed=options.seed,
        batch_seed=options.batch_seed,
        config=config,
    )
    machine = Machine(
        options.output or Path("results", "centralized"), data_roots=dict(options.data_root)
    )
    trained = train_centralized(**reference.arguments(machine), steps=options.steps)
    row = {**reference.factors(), **trained}
    put_row(machine.folder / f"{reference.kind}.jsonl", row, "cell")
    print(
        f"accuracy {row['accuracy'][-1]:.4f}, loss {row['loss'][-1]:.4f} after {row['steps']} "
        f"steps; {machine.folder / row['model_file']}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
