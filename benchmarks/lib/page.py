"""The page of a campaign: what it was run on, a table and a plot of each load, what is missing."""

from __future__ import annotations

import csv
import statistics
from datetime import datetime
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Final

from lib.campaign import ITL_GOAL_MS, TTFT_GOAL_MS
from lib.report import table

if TYPE_CHECKING:
    from pathlib import Path

    from lib.campaign import Book

COLUMNS: Final = {
    "tokens_per_second": ("tokens/s", "{:,.0f}"),
    "ttft_p50_ms": ("TTFT p50, ms", "{:.0f}"),
    "ttft_p99_ms": ("p99", "{:.0f}"),
    "itl_p50_ms": ("ITL p50, ms", "{:.1f}"),
    "itl_p99_ms": ("p99", "{:.1f}"),
    "good_share": ("good", "{:.0%}"),
    "api_us_per_token": ("API, µs a token", "{:.1f}"),
    "api_busy": ("cores", "{:.2f}"),
    "gpu": ("GPU", "{:.0f} %"),
    "client_busy": ("client, cores", "{:.2f}"),
}


def write_page(book: Book) -> None:
    """Write `page.md` and `throughput.png` into the campaign's directory."""
    setting = book.setting
    used = _utilisation(book.directory / "gpu.csv")
    where = setting["gpu"] or f"no GPU: {setting['machine']}"
    parts = [f"# Measured on {where}"]
    if setting["rehearsal"]:
        parts.append(
            "**A rehearsal on a CPU with the demo model. It shows that everything runs; no number "
            "here says anything about a GPU.**"
        )
    parts.append(
        f"{setting['date']}, model: {setting['model']}; versions: "
        + ", ".join(f"{name} {number}" for name, number in setting["packages"].items())
        + f".\n\n`{setting['command']}`\n\nEngine options of all: `{setting['preset']}`. "
        f"Good: first text within {TTFT_GOAL_MS} ms, 99 % of an answer's gaps within "
        f"{ITL_GOAL_MS} ms. Cores: CPU that the API processes took, and the client."
    )
    by_load: dict[str, dict[str, dict[str, Any]]] = {}
    for (label, load), figures in book.results.items():
        busy = [share for at, share in used if 0 <= at - figures["at"] <= figures["seconds"]]
        more = {"gpu": statistics.mean(busy)} if busy else {}
        by_load.setdefault(load, {})[label] = figures | more
    for load, found in by_load.items():
        parts += [f"## {load}", _table(found), _ratios(found)]
    if by_load and find_spec("matplotlib"):  # a lent machine may lack it
        _plot(by_load, book.directory / "throughput.png")
        parts.append("![tokens a second](throughput.png)")
    failed = {note["label"]: note["failed"] for note in book.notes if "failed" in note}
    if failed:
        parts.append("## What failed")
        parts += [f"- {label}: `{why.strip().splitlines()[-1]}`" for label, why in failed.items()]
    took = {note["label"]: note["started_in"] for note in book.notes if "started_in" in note}
    starts = [f"{label} {seconds}" for label, seconds in took.items()]
    parts.append(f"Seconds to start: {', '.join(starts) or 'nothing did'}.")
    (book.directory / "page.md").write_text("\n\n".join(part for part in parts if part) + "\n")


def _table(found: dict[str, dict[str, Any]]) -> str:
    names = [name for name in COLUMNS if any(name in figures for figures in found.values())]
    rows = [["", *(COLUMNS[name][0] for name in names)]]
    for label, figures in found.items():
        cells = (COLUMNS[n][1].format(figures[n]) if n in figures else "" for n in names)
        rows.append([label, *cells])
    return table(rows)


def _ratios(found: dict[str, dict[str, Any]]) -> str:
    """This server's tokens a second as a multiple of each other's."""
    if "synthia" not in found:
        return ""
    ours = found["synthia"]["tokens_per_second"]
    others = [
        f"{ours / figures['tokens_per_second']:.2f} of {label}"
        for label, figures in found.items()
        if label != "synthia"
    ]
    return f"Tokens a second of synthia: {', '.join(others)}." if others else ""


def _utilisation(file: Path) -> list[tuple[float, float]]:
    """Moments, and the share of each second in which the GPU computed."""
    if not file.exists():
        return []
    found = []
    with file.open() as lines:
        for row in csv.reader(lines):
            try:
                at = datetime.strptime(row[0].strip(), "%Y/%m/%d %H:%M:%S.%f").astimezone()
                found.append((at.timestamp(), float(row[1])))
            except (ValueError, IndexError):
                continue  # a line that is being written
    return found


def _plot(by_load: dict[str, dict[str, dict[str, Any]]], file: Path) -> None:
    from matplotlib.figure import Figure

    loads = list(by_load)
    labels = list(dict.fromkeys(label for found in by_load.values() for label in found))
    labels = [label for label in labels if not label.startswith("variant")] or labels
    figure = Figure(figsize=(10, 0.5 + 0.7 * len(loads)), layout="constrained")
    axes = figure.add_subplot()
    height = 0.8 / len(labels)
    for place, label in enumerate(labels):
        at = [number + (place - (len(labels) - 1) / 2) * height for number in range(len(loads))]
        values = [by_load[load].get(label, {}).get("tokens_per_second", 0) for load in loads]
        axes.barh(at, values, height, label=label)
    axes.set_yticks(range(len(loads)), loads)
    axes.invert_yaxis()
    axes.set_xlabel("output tokens per second")
    axes.legend()
    figure.savefig(file, dpi=120)
