"""By how much does a signal lead the breach of an objective? Judges the runs of `signals.py`.

It looks at a run as an autoscaler does: Prometheus scrapes every 5 seconds, a signal is an
expression over the last 30, and the autoscaler asks for it every 15. As nobody knows when in a run
it asks, all 30 ways are looked at.

The objective: 90 % of the requests that come within 15 seconds get their first token in half a
second. The breach is the moment from which it is missed to the end of the run: a burst that passes
is not what a replica is started for. A lead is the time from the first answer above the threshold,
while the load rises, to the breach. Above the threshold in the steady part, which the server can
take, is a false alarm.
"""

from __future__ import annotations

import math
import statistics
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from lib.report import percentile, table

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    Series = NDArray[np.float64]

OBJECTIVE: Final = 0.5
"""Seconds to the first token."""
ATTAINMENT: Final = 0.9
WINDOW: Final = 15.0
"""Seconds of arrivals that the objective is about."""
SCRAPE: Final = 10
"""Looks of `signals.py` from one scrape to the next."""
ASKED: Final = 30
"""Looks from one question of the autoscaler's to the next."""
FALSE: Final = 0.05
"""A threshold that is crossed in no greater share of the steady parts is one that holds."""
LOAD_LATE: Final = 0.6 * OBJECTIVE
"""The p90 of first tokens at which `load` says that a server is full; config/prometheus has it."""


class Seen:
    """What was seen in one run, as PromQL would combine it."""

    def __init__(self, run: Mapping[str, Any]) -> None:
        self.run = run
        self.seen = {name: np.array(values) for name, values in run["seen"].items()}
        self.at: Series = self.seen["at"]
        self.steady: NDArray[np.bool_] = self.at <= run["steady_seconds"]
        self.breach = _breach(run)

    def gauge(self, name: str) -> Series:
        """``avg_over_time(NAME[30s])``."""
        scrapes = range(60 // SCRAPE)
        mean: Series = np.mean([_before(self.seen[name], SCRAPE * i) for i in scrapes], axis=0)
        return mean

    def rate(self, name: str) -> Series:
        """``rate(NAME[30s])``."""
        values = self.seen[name]
        return (values - _before(values, 50)) / (self.at - _before(self.at, 50))

    def mean(self, name: str) -> Series:
        """The mean of a histogram's new values; 0 of none."""
        count = self.rate(f"{name}_count")
        return np.where(count > 0, self.rate(f"{name}_sum") / np.maximum(count, 1e-9), 0.0)

    def places(self, name: str) -> Series:
        """A gauge as a part of the engine's places."""
        return self.gauge(name) / float(self.run["places"])

    def first_token(self, share: float) -> Series:
        """``histogram_quantile``; 0 where nothing was observed, the last bound at most."""
        names = [name for name in self.seen if name.startswith("first_le_")]
        names.sort(key=lambda name: float(name.removeprefix("first_le_")))
        bounds = [float(name.removeprefix("first_le_")) for name in names]
        rates = np.array([self.rate(name) for name in names])
        found = np.zeros(len(self.at))
        for i, column in enumerate(rates.T):
            if not column[-1] > 0:  # or nothing is known yet
                continue
            bucket = min(int(np.searchsorted(column, share * column[-1])), len(bounds) - 2)
            low, below = (bounds[bucket - 1], column[bucket - 1]) if bucket else (0.0, 0.0)
            part = (share * column[-1] - below) / (column[bucket] - below)
            found[i] = low + (bounds[bucket] - low) * min(1.0, part)
        return found

    def tokens(self) -> Series:
        """Tokens of all requests in flight, waiting or not, as a part of what the KV cache takes.

        No series has them. This is from the client's side: a prompt counts from its sending, its
        answer's tokens evenly between the first and the last.
        """
        held = np.zeros(len(self.at))
        for sent, first, took, prompt, answer in self.run["requests"]:
            during = (self.at >= sent) & (self.at < sent + took)
            part = (self.at[during] - sent - first) / max(took - first, 1e-9)
            held[during] += prompt + answer * np.clip(part, 0, 1)
        mean: Series = np.mean([_before(held, SCRAPE * i) for i in range(6)], axis=0)
        return mean / float(self.run["kv_tokens"])

    def load(self) -> Series:
        """The recording rule ``instance:synthia_load:ratio``: the greatest of three."""
        late = np.fmin(self.first_token(0.9) / LOAD_LATE, 1.0)
        most: Series = np.maximum.reduce([self.places("in_flight"), self.gauge("kv"), late])
        return most

    def offered(self, moment: float) -> float:
        """Requests a second that came at this moment."""
        rising = max(0.0, moment - self.run["steady_seconds"])
        return float(self.run["steady_rate"] * math.exp(self.run["growth"] * rising))


def _before(values: Series, looks: int) -> Series:
    """The values so many looks ago; NaN where there are none."""
    return np.concatenate([np.full(looks, np.nan), values[: len(values) - looks]])


def _breach(run: Mapping[str, Any]) -> float:
    """The moment from which the objective is missed to the end, in seconds."""
    sent, first = np.array([request[:2] for request in run["requests"]]).T
    met = 0
    moments = run["seen"]["at"]
    for i, at in enumerate(moments):
        recent = first[(sent > at - WINDOW) & (sent <= at)]
        if np.sum(recent <= OBJECTIVE) >= ATTAINMENT * len(recent):
            met = i
    if moments[-1] - moments[met] < WINDOW:
        raise SystemExit(f"{run['workload']}, seed {run['seed']}: no breach. Offer more.")
    return float(moments[met + 1])


SIGNALS: Final[dict[str, Callable[[Seen], Series]]] = {
    "requests waiting": lambda s: s.gauge("waiting"),
    "requests running / places": lambda s: s.places("running"),
    "requests in flight / places": lambda s: s.places("in_flight"),
    "KV cache usage": lambda s: s.gauge("kv"),
    "tokens in flight / KV cache": Seen.tokens,
    "queue time, mean / objective": lambda s: s.mean("queue") / OBJECTIVE,
    "first token, p90 / objective": lambda s: s.first_token(0.9) / OBJECTIVE,
    "CPU / cores": lambda s: s.rate("cpu") / float(s.run["cores"] or math.nan),
    "load": Seen.load,
}
THRESHOLDS: Final = (*np.arange(0.02, 0.1, 0.02), *np.arange(0.1, 1.01, 0.05), 1.5, 2, 4, 8)


def judge(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What each signal is worth at each threshold on each workload, and its best threshold."""
    all_seen = [Seen(run) for run in runs]
    workloads = sorted({run["workload"] for run in runs})
    signals: dict[str, Any] = {}
    for name, signal in SIGNALS.items():
        values = {
            workload: [(s, signal(s)) for s in all_seen if s.run["workload"] == workload]
            for workload in workloads
        }
        grid = {
            f"{threshold:.3g}": {w: _worth(values[w], threshold) for w in workloads}
            for threshold in THRESHOLDS
        }
        signals[name] = {
            "steady_over_breach": {w: _growth(values[w]) for w in workloads},
            "best": _best(grid),
            "thresholds": grid,
        }
    return {"runs": [_about(s) for s in all_seen], "workloads": workloads, "signals": signals}


def _worth(seen: Sequence[tuple[Seen, Series]], threshold: float) -> dict[str, float | None]:
    leads, falses = [], []
    for run, values in seen:
        above = values > threshold  # never of NaN
        for way in range(ASKED):
            asked = np.arange(len(values)) % ASKED == way
            falses.append(bool(np.any(asked & above & run.steady)))
            crossed = run.at[asked & above & ~run.steady]
            leads.append(run.breach - crossed[0] if len(crossed) else -math.inf)
    median, least = statistics.median(leads), percentile(leads, 0.1)
    return {
        "lead_median_s": round(median, 1) if math.isfinite(median) else None,
        "lead_worst_tenth_s": round(least, 1) if math.isfinite(least) else None,
        "false_alarms": statistics.fmean(falses),
    }


def _growth(seen: Sequence[tuple[Seen, Series]]) -> float:
    """The signal in the steady part, as a share of what it is at the breach: load's own is half."""
    shares = []
    for run, values in seen:
        at_breach = values[np.abs(run.at - run.breach) <= WINDOW / 2]
        shares.append(np.nanmean(values[run.steady]) / max(float(np.nanmean(at_breach)), 1e-9))
    return float(np.mean(shares))


def _best(grid: Mapping[str, Mapping[str, Any]]) -> str | None:
    """The threshold that holds everywhere and has the greatest of the least leads."""

    def least(threshold: str) -> float:
        leads = [found["lead_median_s"] for found in grid[threshold].values()]
        return min(-math.inf if lead is None else float(lead) for lead in leads)

    holds = [t for t in grid if all(w["false_alarms"] <= FALSE for w in grid[t].values())]
    return max(holds, key=lambda t: (least(t), -float(t)), default=None)


def _about(seen: Seen) -> dict[str, Any]:
    """A run without what was seen twice a second, but with each signal every five seconds."""
    run = {key: value for key, value in seen.run.items() if key not in ("seen", "requests")}
    return run | {
        "breach_s": seen.breach,
        "breach_rate": round(seen.offered(seen.breach), 2),
        "at": seen.at[::SCRAPE].round(1).tolist(),
        "signals": {
            name: [None if math.isnan(v) else float(f"{v:.3g}") for v in signal(seen)[::SCRAPE]]
            for name, signal in SIGNALS.items()
        },
    }


def report(found: Mapping[str, Any]) -> str:
    """What `judge` found, as Markdown."""
    workloads = found["workloads"]
    offers: list[list[object]] = [
        ["workload", "steady, requests/s", "growth in a minute", "breach, requests/s"]
    ]
    for workload in workloads:
        runs = [run for run in found["runs"] if run["workload"] == workload]
        growth = f"{100 * math.expm1(60 * runs[0]['growth']):.0f} %"
        breaches = ", ".join(f"{run['breach_rate']:.1f}" for run in runs)
        offers.append([workload, f"{runs[0]['steady_rate']:g}", growth, breaches])
    rows: list[list[object]] = [["signal", "threshold", *workloads]]
    halves: list[list[object]] = [["signal at half the load / at the breach", *workloads]]
    for name, signal in found["signals"].items():
        best = signal["best"]
        worth = signal["thresholds"].get(best, {})
        leads = [_lead(worth[w]) if worth else "" for w in workloads]
        rows.append([name, best or "none holds", *leads])
        halves.append([name, *(f"{signal['steady_over_breach'][w]:.2f}" for w in workloads)])
    load: list[list[object]] = [["load above", *(f"{w}, false alarms" for w in workloads)]]
    for threshold in ("0.5", "0.6", "0.7", "0.8", "0.9"):
        worth = found["signals"]["load"]["thresholds"][threshold]
        cells = [f"{_lead(worth[w])}, {100 * worth[w]['false_alarms']:.0f} %" for w in workloads]
        load.append([threshold, *cells])
    return "\n\n".join(table(part) for part in (offers, rows, halves, load))


def _lead(worth: Mapping[str, Any]) -> str:
    def seconds(value: float | None) -> str:
        return "never" if value is None else f"{value:+.0f}"

    return f"{seconds(worth['lead_median_s'])} ({seconds(worth['lead_worst_tenth_s'])})"


def draw(runs: Sequence[Mapping[str, Any]], found: Mapping[str, Any], file: Path) -> None:
    """The first run of each workload into a PNG: first tokens, and the signals."""
    from matplotlib.figure import Figure  # the tests read this module, and need no pictures

    workloads = found["workloads"]
    threshold = float(found["signals"]["load"]["best"])
    figure = Figure(figsize=(4 * len(workloads), 6.5), layout="constrained")
    panels = figure.subplots(2, len(workloads), sharex="col", squeeze=False)
    for column, workload in enumerate(workloads):
        run = next(run for run in runs if run["workload"] == workload)
        seen = Seen(run)
        upper, lower = panels[:, column]
        upper.set_title(f"{workload}: {run['about']}", fontsize=9)
        sent, first = np.array([request[:2] for request in run["requests"]]).T
        upper.plot(sent, first, ".", markersize=2, color="gray")
        upper.axhline(OBJECTIVE, color="tab:red", linestyle=":", label="objective")
        upper.set_yscale("log")
        for name in ("requests waiting", "requests in flight / places", "KV cache usage"):
            lower.plot(seen.at, SIGNALS[name](seen), label=name, linewidth=1)
        lower.plot(seen.at, SIGNALS["CPU / cores"](seen), label="CPU / cores", linewidth=1)
        lower.plot(seen.at, seen.load(), label="load", color="black", linewidth=2)
        lower.axhline(threshold, color="black", linewidth=0.8, linestyle=":", label="its threshold")
        lower.set_ylim(0, 1.5)
        lower.set_xlabel("seconds")
        for axes in (upper, lower):
            axes.axvline(seen.breach, color="tab:red", label="breach")
            axes.axvline(run["steady_seconds"], color="gray", linestyle="--", label="load rises")
    panels[0, 0].set_ylabel("first token of each request, s")
    panels[1, 0].set_ylabel("signal")
    panels[0, 0].legend(fontsize=8)
    panels[1, 0].legend(fontsize=7)
    figure.savefig(file, dpi=110)
