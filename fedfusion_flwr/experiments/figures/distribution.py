# SPDX-License-Identifier: Apache-2.0
"""The inferred distribution in pictures: clients, assignments, mixture, components, recovery."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pandas as pd
from pandas import DataFrame, Series

from fedfusion_flwr.experiments import inferred
from fedfusion_flwr.experiments.figures import draw
from fedfusion_flwr.experiments.figures.curves import recovery_picture
from fedfusion_flwr.experiments.figures.mixtures import mixtures_picture
from fedfusion_flwr.experiments.results import Results, Setting


def inferred_section(results: Results) -> draw.Section:
    """The first seed's FedFusion run of every setting, and the recovery by all strategies."""
    section = draw.Section("inferred")
    for setting, runs in results.compared.items():
        part = draw.Part(str(setting))
        recovery = recovery_picture(results, setting, runs)
        if recovery is not None:
            part.pictures.append(recovery)
        found = inferred.first_inference(results, runs, section.missing)
        if found is not None:
            seed, run = found
            part.pictures += _run_pictures(setting, f"{setting}, seed {seed}", run, section.missing)
        elif results.is_run:
            section.missing.append(
                "The run has no fusion.npz: only fedfusion infers a distribution."
            )
        elif (runs["algorithm"] == "fedfusion").any():
            section.missing.append(f"{setting}: no inference of its first seed was kept.")
        if part.pictures:
            section.parts.append(part)
    section.missing += inferred.strangers(results)
    return section


def _run_pictures(
    setting: Setting, title: str, run: inferred.Inferred, missing: list[str]
) -> list[draw.Picture]:
    drawn = [_assignments(setting, title, run), _mixture(setting, title, run)]
    if run.is_planted and run.planted_mixtures is not None:
        drawn.insert(1, mixtures_picture(setting, title, run, run.planted_mixtures))
    if run.statistics is None:
        missing.append(f"{title}: fusion.npz holds no statistics; new runs record them.")
        return drawn
    if len(run.clients) < inferred.LEAST_CLIENTS:
        missing.append(f"{title}: {len(run.clients)} clients make no map.")
    else:
        drawn.insert(0, _plane(setting, title, run))
    if run.is_planted:
        drawn.append(_components(setting, title, run, run.statistics))
    return drawn


def _planted(run: inferred.Inferred) -> Series:
    """Planted component by client, missing where it is not known."""
    return Series(run.planted, run.clients, dtype="Int64").where(run.planted >= 0)


def _plane(setting: Setting, title: str, run: inferred.Inferred) -> draw.Picture:
    numbers = DataFrame({"client": run.clients})
    for method, points in run.maps.items():
        numbers[[f"{method.lower()}-{axis}" for axis in "xy"]] = points.astype(float)
    numbers = numbers.assign(inferred=run.main_components, planted=_planted(run).array)
    groupings = ["inferred", "planted"] if run.is_planted else ["inferred"]
    figure, axes = draw.canvas(0.6 + 2.2 * len(run.maps), len(run.maps), len(groupings))
    for row, method in zip(axes, run.maps, strict=True):
        for ax, grouping in zip(row, groupings, strict=True):
            for m, of in numbers.groupby(grouping):
                style, name = draw.numbered_look(int(m)), method.lower()
                look = {"s": 34, "color": style.color, "marker": style.marker, "label": f"{m}"}
                x, y = of[f"{name}-x"], of[f"{name}-y"]
                ax.scatter(x, y, edgecolor="black", linewidth=0.4, **look)
            ax.set_title(f"{method}, {grouping}", fontsize="medium")
            ax.tick_params(labelbottom=False, labelleft=False, length=0)
    for ax, grouping in zip(axes[-1], groupings, strict=True):
        place = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.03), "ncols": 5}
        small = {"fontsize": "small", "title_fontsize": "small", "frameon": False}
        gaps = {"columnspacing": 0.6, "handletextpad": 0.0, "borderpad": 0.0}
        ax.legend(title=f"{grouping} component", **place, **small, **gaps)
    beside = " Left by inferred, right by planted component: the same groups, whatever their " \
        "numbers, mean that the data was found out." if run.is_planted else ""  # fmt: skip
    counts = " beside ".join(f"{numbers[g].nunique()} {g}" for g in groupings)
    return draw.Picture(
        f"inferred-clients-{setting.slug}",
        f"Clients in the plane: {title}",
        "Each mark is a client, placed by its normalization parameters in the last round "
        f"(standardized, as the inference sees them).{beside} In t-SNE only who is near whom "
        "means something.",
        f"Scatter plots of {len(run.clients)} clients in {counts} components.",
        figure,
        numbers,
    )


def _assignments(setting: Setting, title: str, run: inferred.Inferred) -> draw.Picture:
    order, shown = run.order, run.occupied
    columns = 2 if len(shown) > 1 else 1
    rows = math.ceil(len(shown) / columns)
    height = min(max(1.6, 0.09 * len(order) + 0.6), 4.0)
    figure, axes = draw.canvas(1.0 + height * rows, rows, columns, sharex=True, sharey=True)
    edges = (run.rounds[0] - 0.5, run.rounds[-1] + 0.5, len(order) - 0.5, -0.5)
    borders = np.flatnonzero(np.diff(run.planted[order])) + 0.5 if run.is_planted else np.array([])
    for ax, m in zip(axes.flat, shown, strict=False):
        look = {"cmap": "Blues", "vmin": 0, "vmax": 1, "interpolation": "nearest"}
        image = ax.imshow(run.assignments[:, order, m].T, aspect="auto", extent=edges, **look)
        ax.set_title(f"component {m}", fontsize="medium")
        ax.grid(visible=False)
        for border in borders:
            ax.axhline(border, color="black", linewidth=0.7, linestyle=":")
    for ax in axes.flat[len(shown) :]:
        ax.set_visible(False)
    axes[0, 0].set_yticks([])
    for ax in axes[:, 0]:
        ax.set_ylabel("clients")
    for ax in axes.flat[max(len(shown) - columns, 0) : len(shown)]:
        ax.set_xlabel("round")
        ax.tick_params(labelbottom=True)
        ax.xaxis.get_major_locator().set_params(integer=True)
    bar: Any = {"location": "top", "shrink": 0.6, "aspect": 30}
    figure.colorbar(image, ax=axes, label="share b of the client", **bar)
    # Every assignment, clients in this order.
    names = ["round", "client", "component"]
    values = (run.rounds, run.clients[order], range(run.assignments.shape[2]))
    numbers = pd.MultiIndex.from_product(values, names=names).to_frame(index=False)
    numbers.insert(2, "planted", numbers["client"].map(_planted(run)))
    lines = " Dotted lines part the planted groups." if run.is_planted else ""
    return draw.Picture(
        f"inferred-assignments-{setting.slug}",
        f"Assignments: {title}",
        "How much of each client (a row, ordered by planted, then inferred component) belongs to "
        f"each component, round by round. Dark is all of it.{lines} Components that hold less than "
        "one hundredth of the clients throughout are left out.",
        f"Heat maps of assignments by client and round for components {shown}.",
        figure,
        numbers.assign(assignment=run.assignments[:, order].ravel()),
    )


def _mixture(setting: Setting, title: str, run: inferred.Inferred) -> draw.Picture:
    components = range(run.mixture.shape[1])
    numbers = pd.MultiIndex.from_product([run.rounds, components], names=["round", "component"])
    numbers = numbers.to_frame(index=False)
    numbers = numbers.assign(used=run.mixture.ravel(), inferred=run.inferred_mixture.ravel())
    shown = numbers[numbers["component"].isin(run.occupied)]
    shown = shown.assign(component="component " + shown["component"].astype(str))
    styles = {f"component {m}": draw.numbered_look(m) for m in run.occupied}
    figure, axes = draw.canvas(4.4, 2, sharex=True, sharey=True)
    for ax, kind in zip(axes[:, 0], ("used", "inferred"), strict=True):
        draw.lines(ax, shown, "component", "round", kind, styles)
        ax.set(ylabel=f"share pi, as {kind}", xlabel="round" if kind == "inferred" else "")
    axes[0, 0].set_ylim(bottom=0)
    draw.legend_above(figure, axes[0, 0])
    last = draw.in_words(shown.groupby("component", sort=False)["used"].last().items(), 2)
    return draw.Picture(
        f"inferred-mixture-{setting.slug}",
        f"Mixture: {title}",
        "The share of each component in the fused model. Above: as the run used it, by the rule "
        "of its key mixture; below: the posterior mean of the inference. Last round, as used: "
        f"{last}.",
        f"Line charts of the mixture by round. Last round: {last}.",
        figure,
        numbers,
    )


def _components(
    setting: Setting, title: str, run: inferred.Inferred, statistics: np.ndarray
) -> draw.Picture:
    true = inferred.true_components(statistics, run.planted)
    kinds = np.repeat(inferred.KINDS, statistics.shape[1] // len(inferred.KINDS))
    numbers = pd.concat(
        DataFrame(
            {
                "planted": planted,
                "component": component,
                "kind": kinds,
                "channel": np.tile(np.asarray(run.channels), len(inferred.KINDS)),
                "true": true[planted].astype(float),
                "reconstructed": run.components[-1, component].astype(float),
            }
        )
        for planted, component in inferred.matched(run.planted, run.assignments[-1]).items()
    )
    figure, axes = draw.canvas(4.6, 2, 2)
    correlations = []
    for ax, (kind, of_kind) in zip(axes.flat, numbers.groupby("kind", sort=False), strict=True):
        for planted, of in of_kind.groupby("planted"):
            style = draw.numbered_look(int(planted))
            look = {"color": style.color, "markersize": 3.5, "alpha": 0.7}
            label = f"planted {planted}"
            ax.plot(of["true"], of["reconstructed"], style.marker, label=label, **look)
        points = of_kind[["true", "reconstructed"]]
        ends = [points.min(axis=None), points.max(axis=None)]
        ax.plot(ends, ends, color="black", linewidth=0.8, zorder=0)
        ax.set_title(kind, fontsize="medium")
        if points.std().min() > 0:
            correlations.append((kind, points["true"].corr(points["reconstructed"])))
    figure.supxlabel("mean over the planted group's clients", fontsize="medium")
    figure.supylabel("decoded from the component", fontsize="medium")
    draw.legend_above(figure, axes[0, 0])
    correlation = draw.in_words(correlations, 2)
    return draw.Picture(
        f"inferred-components-{setting.slug}",
        f"True and reconstructed components: {title}",
        "Each mark is one channel of one planted group: its normalization parameter, averaged over "
        "the group's clients, against what the decoder makes of the component that holds most of "
        "the group. Both are deviations from the cohort. On the line they are equal; flatter than "
        f"the line, the inference shrinks them. Correlation: {correlation}.",
        "Scatter plots of true against reconstructed normalization parameters. Correlation: "
        f"{correlation}.",
        figure,
        numbers,
    )
