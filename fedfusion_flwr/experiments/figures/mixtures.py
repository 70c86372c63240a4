# SPDX-License-Identifier: Apache-2.0
"""Planted and inferred mixtures beside each other, client by client."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from fedfusion_flwr.experiments.figures import draw
from fedfusion_flwr.experiments.inferred import Inferred
from fedfusion_flwr.experiments.results import Setting
from fedfusion_flwr.tracking.recovery import assignment_error, renumbered

_SPARE = "#dddddd"


def mixtures_picture(
    setting: Setting, title: str, run: Inferred, planted_mixtures: np.ndarray
) -> draw.Picture:
    """Stacked bars of every client's mixture, planted (K, M) and inferred in the last round."""
    rows, count = run.order, planted_mixtures.shape[1]
    planted, inferred, order = renumbered(planted_mixtures[rows], run.assignments[-1, rows])
    error = assignment_error(planted, inferred)
    figure, axes = draw.canvas(3.8, 2, sharex=True, sharey=True)
    for ax, (kind, mixtures) in zip(
        axes[:, 0], {"planted": planted, "inferred": inferred}.items(), strict=True
    ):
        _stack(ax, mixtures, count)
        ax.set(ylabel=f"share, {kind}", xlim=(-0.5, len(rows) - 0.5), ylim=(0, 1))
        for border in np.flatnonzero(np.diff(run.planted[rows])) + 0.5:
            ax.axvline(border, color="black", linewidth=1.2)
    axes[1, 0].set(xlabel="clients", xticks=[])
    draw.legend_above(figure, axes[1, 0])
    index = [run.clients[rows], range(len(order))]
    numbers = pd.MultiIndex.from_product(index, names=["client", "component"])
    # A planted component beyond the inferred ones is matched to none.
    matched = pd.array(np.where(order < run.assignments.shape[2], order, -1), "Int64")
    matched[matched < 0] = pd.NA
    return draw.Picture(
        f"inferred-mixtures-{setting.slug}",
        f"Planted and inferred mixtures: {title}",
        "Each column is a client: above what its data were made of, below its assignment b in the "
        "last round. Black lines part the planted groups. An inferred component has the colour of "
        "the planted one that it is matched to; those left over are spare. "
        f"Mean total variation between above and below: {error:.2f}.",
        f"Stacked bars of the mixtures of {len(rows)} clients, planted above inferred. Mean total "
        f"variation {error:.2f}.",
        figure,
        numbers.to_frame(index=False).assign(
            matched=pd.concat([pd.Series(matched)] * len(rows), ignore_index=True),
            planted=planted.ravel(),
            inferred=inferred.ravel(),
        ),
    )


def _stack(ax: Axes, mixtures: np.ndarray, count: int) -> None:
    """One column a client; the components from ``count`` on are spare and drawn as one."""
    bottom = np.zeros(len(mixtures))
    bar: Any = {"width": 1.0, "edgecolor": "white", "linewidth": 0.4}

    def add(shares: np.ndarray, **look: Any) -> None:
        ax.bar(range(len(shares)), shares, bottom=bottom, **bar, **look)
        bottom[:] += shares

    for m in range(count):
        style = draw.numbered_look(m)
        add(mixtures[:, m], color=style.color, hatch=style.hatch, label=f"component {m}")
    if mixtures[:, count:].any():
        add(mixtures[:, count:].sum(1), color=_SPARE, label="spare")
    ax.grid(visible=False)
