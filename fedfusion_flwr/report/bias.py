# SPDX-License-Identifier: Apache-2.0
"""Feature bias of a setting: measured on the models that are there, or as it was measured once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from fedfusion_flwr.errors import FedFusionError
from fedfusion_flwr.report.bias_models import MODEL, Bench, model_file
from fedfusion_flwr.report.bias_rows import Bias, BiasRow, RunningValues
from fedfusion_flwr.report.bias_store import FILE, BiasRows
from fedfusion_flwr.report.evidence import Cell, Evidence, Reference, Setting, first_of
from fedfusion_flwr.report.pictures import CENTRALIZED


@dataclass(frozen=True)
class SettingBias:
    """Feature bias in one setting: the floor first, then the strategies.

    ``values`` are the running values of one model of each, its first seed's; models without any
    are left out.
    """

    setting: Setting
    rows: list[Bias]
    values: dict[str, RunningValues]


def measure(
    evidence: Evidence, setting: Setting, cells: list[Cell], stored: BiasRows
) -> tuple[SettingBias, list[BiasRow]]:
    """All measures of one setting, and the rows among them that are new.

    What has all its models is measured. What has not comes from the stored rows; only if there is
    no row of it, those centralized models count that are there. Runs whose seed has no centralized
    model are left out, unless that is so of all runs.

    Raises
    ------
    FedFusionError
        If there is nothing to compare, or data or a model cannot be loaded.
    """
    pooled = evidence.references_for(setting)
    seeds = list(dict.fromkeys(reference.seed for reference in pooled))
    kept = [(file, cell) for cell in cells if (file := model_file(cell)) is not None]
    bench = Bench(*kept[0]) if kept else None
    plans: list[tuple[Cell, BiasRow | None, list[Reference]]] = []
    for cell in cells:
        wanted = _references(pooled, cell.seed)
        row = stored.of_cell(cell, _digests(wanted))
        there = _measurable(wanted, row) if model_file(cell) is not None else []
        if there or row is not None:
            plans.append((cell, row, there))
    plans = [plan for plan in plans if plan[0].seed in seeds] or plans
    if not plans:
        if not kept and any(reference.model_file is not None for reference in pooled):
            raise FedFusionError(f"no run directory with a {MODEL} was kept")
        raise FedFusionError("no centralized model of this data and model was kept")

    named = replace(setting, group=cells[0].group)
    found: list[BiasRow] = []
    new: list[BiasRow] = []
    for seed in seeds:
        wanted = _references(pooled, seed)
        row = stored.floor(named, seed, _digests(wanted))
        if bench is not None and (there := _measurable(wanted, row)):
            row = BiasRow(named, seed, *bench.floor(there), _digests(there))
            new.append(row)
        found += [] if row is None else [row]
    for cell, row, there in plans:
        if bench is not None and there:
            measured = bench.run(cell, there)
            row = BiasRow(named, cell.seed, *measured, _digests(there), cell.name, cell.digest)
            new.append(row)
        found += [] if row is None else [row]
    return _joined(setting, found), new


def complaints(evidence: Evidence, stored: BiasRows) -> list[str]:
    """What is wrong with the stored rows, a sentence each: damaged lines, and rows of nothing."""
    of_nothing = [row for row in stored.rows if not _belongs(row, evidence)]
    if not of_nothing:
        return stored.damaged
    names = first_of(row.cell or f"floor of {row.setting}" for row in of_nothing)
    return [
        *stored.damaged,
        f"{FILE} has {len(of_nothing)} of {len(stored.rows)} rows that were measured on other runs "
        f"or centralized models than those of this folder ({names}); they are ignored.",
    ]


def _belongs(row: BiasRow, evidence: Evidence) -> bool:
    return any(
        cell.name == row.cell and cell.digest == row.digest
        if row.cell
        else replace(setting, group=cell.group) == row.setting
        for setting, cells in evidence.compared.items()
        for cell in cells
        if set(row.references)
        <= {*_digests(_references(evidence.references_for(setting), row.seed))}
    )


def _references(pooled: Sequence[Reference], seed: int) -> list[Reference]:
    """The centralized models with which a run of this seed is compared.

    Those of its seed began as the same model; only if there are none, all of them count. A model
    of which two rows tell, as in folders that were put together, counts once.
    """
    distinct = list({r.digest or str(r.model_file): r for r in pooled}.values())
    return [r for r in distinct if r.seed == seed] or distinct


def _measurable(wanted: list[Reference], row: BiasRow | None) -> list[Reference]:
    """Those of the centralized models to measure on now; none where the stored row is better."""
    there = [reference for reference in wanted if reference.model_file is not None]
    return there if row is None or len(there) == len(wanted) else []


def _digests(references: Sequence[Reference]) -> list[str]:
    return [reference.digest for reference in references]


def _joined(setting: Setting, found: list[BiasRow]) -> SettingBias:
    by_strategy: dict[str, list[BiasRow]] = {CENTRALIZED: []}
    for row in found:
        by_strategy.setdefault(row.bias.strategy, []).append(row)
    return SettingBias(
        setting,
        [Bias.joined(name, [row.bias for row in rows]) for name, rows in by_strategy.items()],
        {
            name: values
            for name, rows in by_strategy.items()
            if rows and (values := rows[0].values) is not None
        },
    )
