# SPDX-License-Identifier: Apache-2.0
"""How well the strategies that group clients find the planted groups, round by round."""

from __future__ import annotations

from fedfusion_flwr.report.curves import curve, draw_curve
from fedfusion_flwr.report.evidence import Cell, Setting, by_strategy
from fedfusion_flwr.report.pictures import Numbers, Picture, canvas, in_words, legend_above, looks

_SCORES = {
    "adjusted-rand-index": "adjusted Rand index",
    "normalized-mutual-information": "normalized mutual information",
}


def recovery_picture(setting: Setting, cells: list[Cell]) -> Picture | None:
    """Both scores of every strategy by round; None where nothing is planted or nothing found."""
    found = {
        metric: {
            strategy: c
            for strategy, runs in by_strategy(cells).items()
            if (c := curve(runs, metric)) is not None
        }
        for metric in _SCORES
    }
    if not any(found.values()):
        return None
    shown = [metric for metric in _SCORES if found[metric]]
    figure, axes = canvas(0.5 + 2.1 * len(shown), len(shown), sharex=True)
    styles = looks(strategy for curves in found.values() for strategy in curves)
    numbers: Numbers = []
    for ax, metric in zip(axes[:, 0], shown, strict=True):
        for strategy, c in found[metric].items():
            draw_curve(ax, strategy, styles[strategy], c.rounds, c)
            numbers += [
                {
                    "metric": metric,
                    "strategy": strategy,
                    "round": int(c.rounds[i]),
                    "mean": float(c.mean[i]),
                    "least": float(c.low[i]),
                    "greatest": float(c.high[i]),
                    "seeds": int(c.seeds[i]),
                }
                for i in range(len(c.rounds))
            ]
        ax.set_ylabel(_SCORES[metric])
        ax.axhline(1, color="black", linewidth=0.8, linestyle=":")
    axes[-1, 0].set_xlabel("round")
    axes[-1, 0].xaxis.get_major_locator().set_params(integer=True)
    legend_above(figure, axes[0, 0])
    last = [(s, float(c.mean[-1])) for s, c in found[shown[0]].items()]
    return Picture(
        f"recovery-{setting.slug}",
        f"Recovery of the planted groups: {setting}",
        "How well each strategy's groups of clients are the planted ones; 1 is all of it. For the "
        "adjusted Rand index 0 is what chance gives; mutual information is above 0 by chance, the "
        f"more so the more groups there are. Last round, {_SCORES[shown[0]]}: {in_words(last, 2)}.",
        f"Line charts of recovery scores by round. Last round: {in_words(last, 2)}.",
        figure,
        numbers,
    )
