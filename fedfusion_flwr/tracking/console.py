# SPDX-License-Identifier: Apache-2.0
"""One readable line per round."""

from __future__ import annotations

from collections import Counter
from logging import INFO

from flwr.common.logger import log

from fedfusion_flwr.federation.round import RoundReport

PHASES = ("sample", "exchange", "train", "transfer", "infer", "aggregate", "evaluate")


class ConsoleLine:
    """Logs what happened in a round; round 0 is the untrained model.

    Parameters
    ----------
    num_rounds : int
        The total, to show progress.
    """

    def __init__(self, num_rounds: int) -> None:
        self.num_rounds = num_rounds

    def on_round_end(self, report: RoundReport) -> None:
        """Log the line."""
        log(INFO, "%s", self.line(report))

    def line(self, report: RoundReport) -> str:
        """The line itself."""
        m = report.metrics
        parts = [f"round {report.server_round:>{len(str(self.num_rounds))}}/{self.num_rounds}"]
        if "train-loss" in m:
            parts.append(f"train loss {m['train-loss']:.3f}")
        if "global-accuracy" in m:
            loss = f" loss {m['global-loss']:.3f}" if "global-loss" in m else ""
            parts.append(f"test acc {m['global-accuracy']:.4f}{loss}")
        if "personalized-accuracy" in m:
            parts.append(f"personal acc {m['personalized-accuracy']:.4f}")
        if report.fusion is not None:
            largest = sorted(report.fusion.mixture.tolist(), reverse=True)
            shown = " ".join(f"{value:.2f}" for value in largest if value >= 0.005)
            parts.append(f"components {m['components-occupied']:.0f} [{shown}]")
        elif report.clusters:
            sizes = sorted(Counter(report.clusters.values()).values(), reverse=True)
            parts.append(f"clusters {len(sizes)} {sizes}")
        if "adjusted-rand-index" in m:
            parts.append(f"ARI {m['adjusted-rand-index']:.2f}")
        if report.server_round > 0:
            dropped = m.get("replies-dropped", 0)
            # Of all clients that were asked, also in exchanges before the round.
            asked = max(report.num_sampled, m.get("replies-valid", 0) + dropped)
            parts.append(f"dropped {dropped:.0f}/{asked:.0f}")
            if m.get("updates-clipped"):
                parts.append(f"clipped {m['updates-clipped']:.0f}")
            if m.get("round-failed"):
                parts.append("KEPT OLD MODEL")
            if m.get("fusion-fallback"):
                parts.append("INFERENCE FELL BACK")
            seconds = report.seconds
            shown = " ".join(f"{name} {seconds[name]:.1f}" for name in PHASES if name in seconds)
            parts.append(f"{shown} s")
        return " | ".join(parts)
