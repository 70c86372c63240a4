# SPDX-License-Identifier: Apache-2.0
"""Figures and one self-contained page from the records of a run or of a suite."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from fedfusion_flwr.config import RunConfig
from fedfusion_flwr.report.accuracy import accuracy_section
from fedfusion_flwr.report.bias_pictures import bias_section
from fedfusion_flwr.report.curves import curves_section
from fedfusion_flwr.report.evidence import Evidence, ReportError, read_evidence
from fedfusion_flwr.report.inferred_pictures import inferred_section
from fedfusion_flwr.report.pictures import Section
from fedfusion_flwr.report.variations import ablation_section, hyper_parameters_section

__all__ = ["ReportError", "write_report"]

_SECTIONS = (curves_section, accuracy_section, inferred_section, bias_section)
_OF_SUITES = (hyper_parameters_section, ablation_section)


def write_report(path: Path, output: Path | None = None) -> Path:
    """Draw what the records of a run or a suite say.

    Parameters
    ----------
    path : Path
        A run directory, as `flwr run` leaves it, or a suite's folder of results.
    output : Path or None
        Folder of the report, made if absent; ``path/report`` by default. Files of an earlier report
        with the same names are replaced.

    Returns
    -------
    Path
        The page, ``index.html``. The pictures stand in it; beside it, in ``figures/``, each lies as
        SVG and PNG with its numbers as CSV. What cannot be drawn is named on the page.

    Raises
    ------
    ReportError
        If the path is neither, or a record is damaged.
    """
    evidence = read_evidence(path)
    folder = path / "report" if output is None else output
    figures = folder / "figures"
    figures.mkdir(parents=True, exist_ok=True)
    makers = _SECTIONS if evidence.is_run else (*_SECTIONS, *_OF_SUITES)
    sections = [make(evidence) for make in makers]
    images = {}
    for part in (part for section in sections for part in section.parts):
        for picture in part.pictures:
            picture.write(figures)
            images[picture.name] = picture.data_uri(figures)
        for table in part.tables:
            table.write(figures)
    page = folder / "index.html"
    page.write_text(_render(evidence, sections, images), encoding="utf-8")
    return page


def _render(evidence: Evidence, sections: list[Section], images: dict[str, str]) -> str:
    environment = Environment(
        loader=PackageLoader("fedfusion_flwr.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
    )
    return environment.get_template("page.html").render(
        title=f"FedFusion: {'run' if evidence.is_run else 'suite'} {evidence.path.resolve().name}",
        lead=_lead(evidence),
        facts=_facts(evidence),
        sections=sections,
        images=images,
        made=f"Made by fedfusion-flwr {version('fedfusion-flwr')}.",
    )


def _lead(evidence: Evidence) -> str:
    if evidence.is_run:
        cell = evidence.cells[0]
        rounds = cell.metrics[-1]["round"] if cell.metrics else 0
        return (
            f"One run of {cell.strategy} on {cell.setting}: {cell.config['num-clients']} clients, "
            f"{rounds} rounds, seed {cell.seed}. Keys that are not the default:"
        )
    strategies = {cell.strategy for cell in evidence.cells}
    seeds = {cell.seed for cell in evidence.cells}
    return (
        f"{len(evidence.cells)} runs of {len(strategies)} strategies in "
        f"{len(evidence.compared)} settings, with {len(seeds)} seeds. A picture's caption says "
        "how its numbers were made."
    )


def _facts(evidence: Evidence) -> list[tuple[str, str]]:
    if evidence.is_run:
        usual = RunConfig().to_run_config()
        config = evidence.cells[0].config
        return [(key, str(value)) for key, value in config.items() if value != usual[key]]
    # A machine's own description has commas.
    facts = [(name, "; ".join(values)) for name, values in evidence.about.items()]
    return [*facts, ("failed runs", ", ".join(evidence.failed) or "none")]
