# SPDX-License-Identifier: Apache-2.0
"""Figures and one self-contained page from the records of a run or of a suite."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from fedfusion_flwr.config import RunConfig
from fedfusion_flwr.experiments.figures.accuracy import accuracy_section
from fedfusion_flwr.experiments.figures.curves import curves_section
from fedfusion_flwr.experiments.figures.distribution import inferred_section
from fedfusion_flwr.experiments.figures.draw import Section
from fedfusion_flwr.experiments.figures.feature_bias import bias_section
from fedfusion_flwr.experiments.figures.variations import ablation_section, hyper_parameters_section
from fedfusion_flwr.experiments.results import Results, read_results

_SECTIONS = (curves_section, accuracy_section, inferred_section, bias_section)
_OF_SUITES = (hyper_parameters_section, ablation_section)


def write_report(path: Path, output: Path | None = None) -> Path:
    """Draw the records of a run or a suite.

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
        The page, ``index.html``. It contains the pictures; beside it, in ``figures/``, each is
        there as SVG and PNG with its numbers as CSV. The page names what cannot be drawn.

    Raises
    ------
    ResultsError
        If the path is neither, or a record is damaged.
    """
    results = read_results(path)
    folder = path / "report" if output is None else output
    figures = folder / "figures"
    figures.mkdir(parents=True, exist_ok=True)
    makers = _SECTIONS if results.is_run else (*_SECTIONS, *_OF_SUITES)
    sections = [make(results) for make in makers]
    images = {}
    for part in (part for section in sections for part in section.parts):
        for picture in part.pictures:
            images[picture.name] = picture.write(figures)
        for table in part.tables:
            table.write(figures)
    page = folder / "index.html"
    page.write_text(_render(results, sections, images), encoding="utf-8")
    return page


def _render(results: Results, sections: list[Section], images: dict[str, str]) -> str:
    environment = Environment(
        loader=PackageLoader("fedfusion_flwr.experiments", "."),
        autoescape=True,
        undefined=StrictUndefined,
    )
    return environment.get_template("page.html").render(
        name=results.path.resolve().name,
        results=results,
        facts=_facts(results),
        sections=sections,
        images=images,
        version=version("fedfusion-flwr"),
    )


def _facts(results: Results) -> list[tuple[str, str]]:
    if results.is_run:
        usual = RunConfig().to_run_config()
        config = results.runs["config"].iat[0]
        return [(key, str(value)) for key, value in config.items() if value != usual.get(key)]
    # A machine's own description has commas.
    facts = [(name, "; ".join(values)) for name, values in results.about.items()]
    return [*facts, ("failed runs", ", ".join(results.failed) or "none")]
