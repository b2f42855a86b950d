"""Pictures of a load run: how latencies spread, what came when, and a sweep over its rates."""

from __future__ import annotations

from itertools import accumulate
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.figure import Figure

from lib.score import MEASURES

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from matplotlib.axes import Axes


def draw_run(outputs: Sequence[Any], file: Path) -> None:
    """Cumulative distributions of the latencies, and tokens a second over time, into a PNG.

    `outputs` are vLLM's `RequestFuncOutput`; those that are not whole are left out.
    """
    whole = [output for output in outputs if output.success]
    figure = Figure(figsize=(11, 6.5), layout="constrained")
    axes = figure.subplot_mosaic([list(MEASURES), ["tokens"] * len(MEASURES)])
    for measure, values in latencies(whole).items():
        _distribution(axes[measure], values, measure)
    rates = tokens_by_second(whole)
    axes["tokens"].stairs(rates, range(len(rates) + 1), fill=True, alpha=0.6)
    axes["tokens"].set_xlabel("seconds since the first request")
    axes["tokens"].set_ylabel("tokens per second")
    figure.savefig(file, dpi=150)


def latencies(whole: Sequence[Any]) -> dict[str, list[float]]:
    """All values of each measure, in ms; the gaps of all answers together."""
    return {
        "ttft": [1e3 * output.ttft for output in whole],
        "itl": [1e3 * gap for output in whole for gap in output.itl],
        "tpot": [
            1e3 * (output.latency - output.ttft) / (output.output_tokens - 1)
            for output in whole
            if output.output_tokens > 1
        ],
        "e2el": [1e3 * output.latency for output in whole],
    }


def tokens_by_second(whole: Sequence[Any]) -> list[float]:
    """Tokens that came in each second since the first request.

    Of an answer whose events were fewer than its tokens, each event counts for as many.
    """
    if not whole:
        return []
    begun = min(output.start_time for output in whole)
    ends = max(output.start_time + output.latency for output in whole)
    seconds = [0.0] * (int(ends - begun) + 1)
    for output in whole:
        first = output.start_time + output.ttft - begun
        each = output.output_tokens / (1 + len(output.itl))
        for moment in accumulate(output.itl, initial=first):
            seconds[min(int(moment), len(seconds) - 1)] += each
    return seconds


def draw_sweep(steps: Sequence[Mapping[str, Any]], goals: Mapping[str, float], file: Path) -> None:
    """TTFT and ITL at p99, and goodput, over the rates of a sweep, into a PNG."""
    by_rate = sorted(steps, key=lambda step: float(step["request_rate"]))
    rates = [step["request_rate"] for step in by_rate]
    figure = Figure(figsize=(11, 4), layout="constrained")
    panels = figure.subplots(1, 3)
    for axes, measure in zip(panels, ("ttft", "itl"), strict=False):
        axes.plot(rates, [step[f"p99_{measure}_ms"] for step in by_rate], "o-")
        if measure in goals:
            axes.axhline(goals[measure], color="tab:red", linestyle="--", label="objective")
            axes.legend()
        axes.set_ylabel(f"{measure.upper()} p99, ms")
        axes.set_yscale("log")
    panels[2].plot(rates, rates, color="gray", linestyle="--", label="all")
    panels[2].plot(rates, [step["request_goodput"] for step in by_rate], "o-", label="good")
    panels[2].set_ylabel("answers that met all, per second")
    panels[2].legend()
    for axes in panels:
        axes.set_xlabel("requests per second")
    figure.savefig(file, dpi=150)


def _distribution(axes: Axes, values: Sequence[float], measure: str) -> None:
    axes.set_xlabel(f"{measure.upper()}, ms")
    axes.set_ylabel("share of gaps" if measure == "itl" else "share of answers")
    if not values:
        return
    ordered = np.sort(values)
    axes.plot(ordered, np.arange(1, len(ordered) + 1) / len(ordered))
    for share in (50, 99):
        value = float(np.percentile(ordered, share))
        axes.axvline(value, color="gray", linestyle=":", label=f"p{share}: {value:.1f}")
    axes.set_xlim(0, 1.5 * float(np.percentile(ordered, 99)) or 1)  # outliers hide all the rest
    axes.legend(loc="lower right")
