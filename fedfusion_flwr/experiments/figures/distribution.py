# SPDX-License-Identifier: Apache-2.0
"""The inferred distribution in pictures: clients, assignments, mixture, components, recovery."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
from pandas import DataFrame, Series

from fedfusion_flwr.experiments.figures.curves import recovery_picture
from fedfusion_flwr.experiments.figures.style import (
    Part,
    Picture,
    Section,
    canvas,
    in_words,
    legend_above,
    numbered_look,
)
from fedfusion_flwr.experiments.inferred import (
    KINDS,
    LEAST_CLIENTS,
    Inferred,
    first_inference,
    matched,
    strangers,
    true_components,
)
from fedfusion_flwr.experiments.results import Results, Setting


def inferred_section(results: Results) -> Section:
    """The first seed's FedFusion run of every setting, and the recovery by all strategies."""
    section = Section(
        "inferred",
        "The inferred distribution",
        "What the server made of the clients from their normalization parameters alone, beside "
        "what was planted, if the partition plants something. Components are numbered as the "
        "run numbers them; planted ones have numbers of their own.",
    )
    for setting, runs in results.compared.items():
        part = Part(str(setting))
        recovery = recovery_picture(results, setting, runs)
        if recovery is not None:
            part.pictures.append(recovery)
        found = first_inference(results, runs, section.missing)
        if found is not None:
            index, run = found
            title = f"{setting}, seed {runs.loc[index, 'seed']}"
            part.pictures += _run_pictures(setting, title, run, section.missing)
        elif results.is_run:
            section.missing.append(
                "The run has no fusion.npz: only fedfusion infers a distribution."
            )
        elif (runs["algorithm"] == "fedfusion").any():
            section.missing.append(f"{setting}: no inference of its first seed was kept.")
        if part.pictures:
            section.parts.append(part)
    section.missing += strangers(results)
    return section


def _run_pictures(setting: Setting, title: str, run: Inferred, missing: list[str]) -> list[Picture]:
    drawn = [_assignments(setting, title, run), _mixture(setting, title, run)]
    if run.statistics is None:
        missing.append(f"{title}: fusion.npz holds no statistics; new runs record them.")
        return drawn
    if len(run.clients) < LEAST_CLIENTS:
        missing.append(f"{title}: {len(run.clients)} clients make no map.")
    else:
        drawn.insert(0, _plane(setting, title, run))
    if run.is_planted:
        drawn.append(_components(setting, title, run, run.statistics))
    return drawn


def _plane(setting: Setting, title: str, run: Inferred) -> Picture:
    maps = run.maps
    groupings = {"inferred": run.main_components}
    if run.is_planted:
        groupings["planted"] = run.planted
    figure, axes = canvas(0.6 + 2.2 * len(maps), len(maps), len(groupings))
    for row, (method, points) in zip(axes, maps.items(), strict=True):
        for ax, (grouping, groups) in zip(row, groupings.items(), strict=True):
            for m in np.unique(groups):
                style, chosen = numbered_look(int(m)), groups == m
                look = {"s": 34, "color": style.color, "marker": style.marker, "label": f"{m}"}
                ax.scatter(*points[chosen].T, edgecolor="black", linewidth=0.4, **look)
            ax.set_title(f"{method}, {grouping}", fontsize="medium")
            ax.tick_params(labelbottom=False, labelleft=False, length=0)
    for ax, grouping in zip(axes[-1], groupings, strict=True):
        place = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.03), "ncols": 5}
        small = {"fontsize": "small", "title_fontsize": "small", "frameon": False}
        gaps = {"columnspacing": 0.6, "handletextpad": 0.0, "borderpad": 0.0}
        ax.legend(title=f"{grouping} component", **place, **small, **gaps)
    beside = " Left by inferred, right by planted component: the same groups, whatever their " \
        "numbers, mean that the data was found out." if run.is_planted else ""  # fmt: skip
    return Picture(
        f"inferred-clients-{setting.slug}",
        f"Clients in the plane: {title}",
        "Each mark is a client, placed by its normalization parameters in the last round "
        f"(standardized, as the inference sees them).{beside} In t-SNE only who is near whom "
        "means something.",
        f"Scatter plots of {len(run.clients)} clients in {len(np.unique(run.main_components))} "
        "inferred components"
        + (f" beside {len(np.unique(run.planted))} planted ones." if run.is_planted else "."),
        figure,
        DataFrame(
            {
                "client": run.clients,
                **{
                    f"{method.lower()}-{axis}": points[:, a].astype(float)
                    for method, points in maps.items()
                    for a, axis in enumerate("xy")
                },
                "inferred": run.main_components,
                "planted": _planted(run.planted),
            }
        ),
    )


def _assignments(setting: Setting, title: str, run: Inferred) -> Picture:
    order, shown = run.order(), run.occupied
    columns = 2 if len(shown) > 1 else 1
    rows = math.ceil(len(shown) / columns)
    height = min(max(1.6, 0.09 * len(order) + 0.6), 4.0)
    figure, axes = canvas(1.0 + height * rows, rows, columns, sharex=True, sharey=True)
    edges = (run.rounds[0] - 0.5, run.rounds[-1] + 0.5, len(order) - 0.5, -0.5)
    borders = np.flatnonzero(np.diff(run.planted[order])) + 0.5 if run.is_planted else np.array([])
    image = None
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
    if image is not None:
        figure.colorbar(
            image, ax=axes, label="share b of the client", location="top", shrink=0.6, aspect=30
        )
    lines = " Dotted lines part the planted groups." if run.is_planted else ""
    return Picture(
        f"inferred-assignments-{setting.slug}",
        f"Assignments: {title}",
        "How much of each client (a row, ordered by planted, then inferred component) belongs to "
        f"each component, round by round. Dark is all of it.{lines} Components that hold less than "
        "one hundredth of the clients throughout are left out.",
        f"Heat maps of assignments by client and round for components {shown}.",
        figure,
        _numbers(run, order),
    )


def _numbers(run: Inferred, order: np.ndarray) -> DataFrame:
    """Every assignment, clients in this order."""
    names = ["round", "client", "component"]
    components = range(run.assignments.shape[2])
    index = pd.MultiIndex.from_product([run.rounds, run.clients[order], components], names=names)
    table = DataFrame({"assignment": run.assignments[:, order].ravel()}, index).reset_index()
    planted = dict(zip(run.clients, _planted(run.planted), strict=True))
    table["planted"] = table["client"].map(planted).astype("Int64")
    return table[["round", "client", "planted", "component", "assignment"]]


def _planted(components: np.ndarray) -> Series:
    """Planted components, missing where they are not known."""
    return Series(components, dtype="Int64").where(components >= 0)


def _mixture(setting: Setting, title: str, run: Inferred) -> Picture:
    kinds = {"used": run.mixture, "inferred": run.inferred_mixture}
    figure, axes = canvas(4.4, 2, sharex=True, sharey=True)
    for ax, (kind, mixture) in zip(axes[:, 0], kinds.items(), strict=True):
        for m in run.occupied:
            look = numbered_look(m).curve(len(run.rounds))
            ax.plot(run.rounds, mixture[:, m], label=f"component {m}", **look)
        ax.set_ylabel(f"share pi, as {kind}")
    axes[0, 0].set_ylim(bottom=0)
    axes[1, 0].set_xlabel("round")
    axes[1, 0].xaxis.get_major_locator().set_params(integer=True)
    legend_above(figure, axes[0, 0])
    last = [(f"component {m}", float(run.mixture[-1, m])) for m in run.occupied]
    return Picture(
        f"inferred-mixture-{setting.slug}",
        f"Mixture: {title}",
        "The share of each component in the fused model. Above: as the run used it, by the rule "
        "of its key mixture; below: the posterior mean of the inference. Last round, as used: "
        f"{in_words(last, 2)}.",
        f"Line charts of the mixture by round. Last round: {in_words(last, 2)}.",
        figure,
        DataFrame(
            {
                "round": np.repeat(run.rounds, run.mixture.shape[1]),
                "component": np.tile(np.arange(run.mixture.shape[1]), len(run.rounds)),
                "used": run.mixture.ravel(),
                "inferred": run.inferred_mixture.ravel(),
            }
        ),
    )


def _components(setting: Setting, title: str, run: Inferred, statistics: np.ndarray) -> Picture:
    true = true_components(statistics, run.planted)
    assert run.channels is not None
    width = len(run.channels)
    numbers = pd.concat(
        DataFrame(
            {
                "planted": planted,
                "component": component,
                "kind": kind,
                "channel": run.channels,
                "true": true[planted][at : at + width].astype(float),
                "reconstructed": run.components[-1, component, at : at + width].astype(float),
            }
        )
        for planted, component in matched(run.planted, run.assignments[-1]).items()
        for kind, at in zip(KINDS, range(0, width * len(KINDS), width), strict=True)
    )
    figure, axes = canvas(4.6, 2, 2)
    correlations = []
    for ax, kind in zip(axes.flat, KINDS, strict=True):
        of_kind = numbers[numbers["kind"] == kind]
        points = of_kind[["true", "reconstructed"]].to_numpy()
        for planted, of in of_kind.groupby("planted"):
            style = numbered_look(int(planted))
            look = {"color": style.color, "markersize": 3.5, "alpha": 0.7}
            label = f"planted {planted}"
            ax.plot(of["true"], of["reconstructed"], style.marker, label=label, **look)
        ends = [points.min(), points.max()]
        ax.plot(ends, ends, color="black", linewidth=0.8, zorder=0)
        ax.set_title(kind, fontsize="medium")
        if points.std(0).min() > 0:
            correlations.append((kind, float(np.corrcoef(points.T)[0, 1])))
    figure.supxlabel("mean over the planted group's clients", fontsize="medium")
    figure.supylabel("decoded from the component", fontsize="medium")
    legend_above(figure, axes[0, 0])
    return Picture(
        f"inferred-components-{setting.slug}",
        f"True and reconstructed components: {title}",
        "Each mark is one channel of one planted group: its normalization parameter, averaged over "
        "the group's clients, against what the decoder makes of the component that holds most of "
        "the group. Both are deviations from the cohort. On the line they are equal; flatter than "
        f"the line, the inference shrinks them. Correlation: {in_words(correlations, 2)}.",
        "Scatter plots of true against reconstructed normalization parameters. Correlation: "
        f"{in_words(correlations, 2)}.",
        figure,
        numbers,
    )
