"""Draws the Grafana dashboard's panels from its own queries, without Grafana.

    python benchmarks/dashboard.py docs/measurements/dashboard.png
    python benchmarks/dashboard.py --seconds 60 picture.png

Starts a demo server and a Prometheus with `config/prometheus/`, offers load, then asks Prometheus
what each panel of `config/grafana/dashboards/synthia-vllm.json` would ask, and draws the answers
in the dashboard's own layout.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import re
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from lib.client import serve
from lib.monitored import CONFIG, FLAGS, USERS, Prometheus, offer, prometheus
from lib.report import say

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FILE: Final = CONFIG / "grafana/dashboards/synthia-vllm.json"
SCRAPED: Final = 2
"""Every so many seconds Prometheus asks the server."""
_UNITS: Final = {"none": "", "percentunit": "share", "reqps": "per s", "ops": "per s"}


@dataclass(frozen=True)
class Query:
    """What one panel asks, as Grafana would send it."""

    panel: str
    expression: str
    legend: str
    instant: bool


def queries(
    panel: Mapping[str, Any], variables: Mapping[str, str], *, scraped: float, shown: float
) -> list[Query]:
    """The queries of `panel`; it was scraped every `scraped` seconds, and shows the last `shown`.

    `variables` are the dashboard's own. Raises `KeyError` for one that is unknown.
    """
    # Grafana's rule, for steps up to three scrapes.
    known = {"__rate_interval": f"{4 * scraped:g}s", "__range": f"{round(shown)}s", **variables}
    return [
        Query(
            panel["title"],
            filled(target["expr"], known),
            target["legendFormat"],
            target["instant"],
        )
        for target in panel.get("targets", [])
    ]


def filled(text: str, variables: Mapping[str, str]) -> str:
    """`text` with the values of its variables. Raises `KeyError` for one that is unknown."""
    return re.sub(r"\$(?:(\w+)|\{(\w+)\})", lambda match: variables[match[1] or match[2]], text)


def defaults(dashboard: Mapping[str, Any]) -> dict[str, str]:
    """The dashboard's variables as they are when it is opened, but for the data source."""
    return {
        variable["name"]: variable["allValue"]
        for variable in dashboard["templating"]["list"]
        if variable["type"] == "query"
    }


def legend(query: Query, labels: Mapping[str, str]) -> str:
    """The name of a result, as Grafana makes it."""
    return re.sub(r"{{(\w+)}}", lambda match: labels.get(match[1], ""), query.legend)


@dataclass(frozen=True)
class Window:
    """What the picture shows: of which Prometheus, and from when to when."""

    source: Prometheus
    begin: float
    end: float

    def last(self, asked: Sequence[Query]) -> dict[str, float]:
        """The results of `asked` at the end, by their names."""
        return {
            legend(query, result["metric"]): float(result["value"][1])
            for query in asked
            for result in self.source.query(query.expression, self.end)
        }

    def lines(self, asked: Sequence[Query]) -> tuple[list[float], dict[str, list[float]]]:
        """Seconds since the beginning, and the results of `asked` at each; NaN where is none."""
        step = SCRAPED
        moments = [self.begin + step * i for i in range(int((self.end - self.begin) / step) + 1)]
        found: dict[str, list[float]] = {}
        for query in asked:
            for result in self.source.query_range(query.expression, self.begin, self.end, step):
                at = {round(float(moment)): float(text) for moment, text in result["values"]}
                name = legend(query, result["metric"])
                found[name] = [at.get(round(moment), math.nan) for moment in moments]
        return [moment - self.begin for moment in moments], found


def draw(window: Window, file: Path) -> None:
    """All panels, into a PNG."""
    from matplotlib.figure import Figure

    dashboard = json.loads(FILE.read_text())
    variables, shown = defaults(dashboard), window.end - window.begin
    height = max(panel["gridPos"]["y"] + panel["gridPos"]["h"] for panel in dashboard["panels"])
    figure = Figure(figsize=(15, height * 0.36))
    for panel in dashboard["panels"]:
        place = panel["gridPos"]
        if panel["type"] == "row":
            middle = 1 - (place["y"] + 0.7) / height
            figure.text(0.01, middle, panel["title"], size=15, weight="bold")
            continue
        axes = _axes(figure, place, height)
        axes.set_title(panel["title"], loc="left", size=10)
        asked = queries(panel, variables, scraped=SCRAPED, shown=shown)
        if panel["type"] == "timeseries":
            _curves(axes, panel, *window.lines(asked))
        elif panel["type"] == "stat":
            _numbers(axes, window.last(asked))
        else:
            _bars(axes, panel, window.last(asked))
    figure.savefig(file, dpi=75)


def _axes(figure: Figure, place: Mapping[str, int], height: int) -> Axes:
    left, right = place["x"] / 24 + 0.035, (place["x"] + place["w"]) / 24 - 0.01
    bottom, top = place["y"] + place["h"] - 0.9, place["y"] + 0.9
    return figure.add_axes((left, 1 - bottom / height, right - left, (bottom - top) / height))


def _curves(
    axes: Axes, panel: Mapping[str, Any], seconds: list[float], found: Mapping[str, list[float]]
) -> None:
    field = panel["fieldConfig"]["defaults"]
    if "stacking" in field["custom"]:
        stacked = [[0 if math.isnan(y) else y for y in values] for values in found.values()]
        axes.stackplot(seconds, stacked, labels=list(found), alpha=0.7)
    else:
        for name, values in found.items():
            axes.plot(seconds, values, label=name)
    if "thresholdsStyle" in field["custom"]:
        axes.axhline(field["thresholds"]["steps"][1]["value"], color="tab:red", linestyle="--")
    axes.set_xlim(0, seconds[-1])
    axes.set_ylim(0, field.get("max", 1.25 * axes.get_ylim()[1]))  # room for the legend
    axes.set_ylabel(_UNITS.get(field["unit"], field["unit"].removeprefix("suffix:").strip()))
    axes.tick_params(labelsize=7)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=6.5, loc="upper left", ncols=2)


def _numbers(axes: Axes, found: Mapping[str, float]) -> None:
    axes.axis("off")
    for number, (name, value) in enumerate(found.items()):
        middle = (number + 0.5) / len(found)
        axes.text(middle, 0.5, f"{value:g}", size=22, ha="center")
        axes.text(middle, 0.2, name, size=9, ha="center")


def _bars(axes: Axes, panel: Mapping[str, Any], found: Mapping[str, float]) -> None:
    field = panel["fieldConfig"]["defaults"]
    most = field.get("max", 1.5 * max(found.values()))  # room for the names
    bars = axes.barh(list(found)[::-1], [min(value, most) for value in found.values()][::-1])
    texts = [
        f" {name}: {value:,.0f}" if value > 100 else f" {name}: {value:.2g}"
        for name, value in found.items()
    ]
    axes.bar_label(bars, texts[::-1], fontsize=9, padding=2)
    for mark in field["thresholds"]["steps"][1:]:
        axes.axvline(mark["value"], color=mark["color"], linestyle="--")
    axes.set_xlim(0, most)
    axes.set_yticks([])
    axes.tick_params(axis="x", labelsize=7)


async def record(seconds: float, file: Path) -> None:
    """Run everything for `seconds` and draw it."""
    with tempfile.TemporaryDirectory(prefix="dashboard-") as place:
        flags = (*FLAGS, "--set", f"transcripts.directory={place}")
        async with serve(*flags, users=USERS) as target:
            with prometheus(target.url, Path(place), f"{SCRAPED}s") as source:
                begin = time.time()
                load = asyncio.create_task(offer(target.url, target.keys, seconds))
                while not load.done():
                    say(f"offering load: {time.time() - begin:.0f} of {seconds:g} s")
                    await asyncio.sleep(1)
                print(f"answers by status: {dict(sorted(load.result().items()))}")
                draw(Window(source, begin, time.time()), file)


def main() -> None:
    """Parse the command line, run, draw."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", type=Path, help="the picture to write (PNG)")
    parser.add_argument("--seconds", type=float, default=150, help="of load (default: 150)")
    arguments = parser.parse_args()
    asyncio.run(record(arguments.seconds, arguments.file))
    print(f"wrote {arguments.file}")


if __name__ == "__main__":
    main()
