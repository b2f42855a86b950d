"""How the serving layer's cost grows: with open streams, idle connections, prompts, conversations.

CPU is that of the API process alone, by its own clock. What a token costs, and the gaps between
tokens, are taken while all streams stream: from when the last has begun to when the first ends, so
that neither has what requests cost in it.

- busy: so many streams at once;
- idle: so many open connections with nothing on them, beside a few busy streams;
- prompt: a request for one token, by the tokens of its prompt, up to the context;
- messages: the same, by the number of messages that the same text is cut into (each message adds
  some tokens of its own).

The demo model's engine makes a thousand tokens or so a second on two cores, however many streams
share them, so its gaps between tokens grow with the streams. What the edge does where the engine
is not the limit is `ceiling.py`'s to show.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import sys
import time
import urllib.error
import urllib.request
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import uvloop
from lib.meter import Meter, Talk, closed_at_end, idle_connections
from lib.report import machine, say, spread, table, write_json
from lib.servers import Running, start

EXAMPLES = """\
examples:
  python benchmarks/scale.py
  python benchmarks/scale.py --plot . --json scale.json       also scale.png
  python benchmarks/scale.py --sweeps busy --streams 1 64 1000 --rounds 1
"""
STREAMS: Final = (1, 4, 16, 64, 256, 1000)
BESIDE: Final = 16
"""Busy streams beside the idle connections."""
SHARES: Final = (1 / 64, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 3 / 4, 0.95)
"""Prompt lengths, as parts of the context."""
MESSAGES: Final = (1, 5, 17, 65, 129, 255)
"""An odd number of them, so that the last is the user's."""
MESSAGES_WORDS: Final = 255
FLAT: Final = 1.25
"""What still passes for flat: the last value is at most so many times that of 16 streams."""


@dataclass
class Sweep:
    """The figures of one row of the tables: by `x`, then by name, a value for each round."""

    title: str
    x: str
    flat: bool
    """Whether it should stay the same; else it should lie on a straight line."""
    found: dict[int, dict[str, list[float]]] = field(default_factory=dict)

    def note(self, x: int, **values: float) -> None:
        for name, value in values.items():
            self.found.setdefault(x, {}).setdefault(name, []).append(value)

    def medians(self, name: str) -> tuple[list[int], list[float]]:
        """The places and the medians there, for drawing."""
        places = sorted(self.found)
        return places, [statistics.median(self.found[x][name]) for x in places]


SWEEPS: Final = {
    "busy": ("CPU of a streamed token, by streams at once", "streams", True),
    "idle": (f"the same of {BESIDE} streams, by idle connections beside them", "idle", True),
    "prompt": ("CPU of a request for one token, by its prompt", "prompt tokens", False),
    "messages": ("the same, by messages of the same text", "messages", False),
}


def context_of(target: Running) -> int:
    """Tokens that a prompt and its answer may have together."""
    with urllib.request.urlopen(f"{target.url}/v1/models", timeout=10) as response:
        return int(json.load(response)["data"][0]["max_model_len"])


def prompt_tokens(target: Running, load: Talk) -> int:
    """Tokens of a prompt of `load`, as the server counts them. Raises `SystemExit` if refused."""
    asked = urllib.request.Request(
        f"{target.url}/v1/chat/completions",
        json.dumps(json.loads(load.body(0)) | {"stream": False, "stream_options": None}).encode(),
        {"Content-Type": "application/json"},
    )
    try:
        with urllib.request.urlopen(asked, timeout=60) as response:
            return int(json.load(response)["usage"]["prompt_tokens"])
    except urllib.error.HTTPError as error:
        raise SystemExit(f"refused: {error.read().decode()}") from error


async def at_rest(target: Running) -> float:
    """The share of a core that the API process takes while there is nothing to do."""
    await asyncio.sleep(1)
    begun, cpu = time.perf_counter(), target.api_cpu()
    await asyncio.sleep(3)
    return (target.api_cpu() - cpu) / (time.perf_counter() - begun)


async def measure_streams(
    sweeps: dict[str, Sweep],
    meter: Meter,
    target: Running,
    counts: list[int],
    rounds: int,
) -> None:
    """The sweeps over streams and over idle connections."""
    await meter.per_token(target, BESIDE)  # to warm up
    for number in range(rounds):
        for streams in counts:
            if "busy" in sweeps:
                say(f"round {number + 1} of {rounds}: {streams} streams")
                found = await meter.per_token(target, streams)
                one = Talk("request", streams, streams, 1, True)
                found |= await meter.per_request(target, one)
                sweeps["busy"].note(streams, **found)
            if "idle" in sweeps:
                say(f"round {number + 1} of {rounds}: {streams} idle connections")
                connections = await idle_connections(target, streams)
                with closed_at_end(connections):
                    found = await meter.per_token(target, BESIDE)
                sweeps["idle"].note(streams, **found)


async def measure_prompts(
    sweeps: dict[str, Sweep], meter: Meter, target: Running, rounds: int
) -> None:
    """The sweeps over prompt lengths and over numbers of messages."""

    def load(words: int, messages: int) -> Talk:
        return Talk("request", 8, 16, 1, True, words=words, messages=messages)

    # Words of each prompt, from what the server makes of some.
    each = (prompt_tokens(target, load(900, 1)) - prompt_tokens(target, load(100, 1))) / 800
    lengths = [int(share * context_of(target) / each) for share in SHARES]
    loads = {"prompt": [load(words, 1) for words in lengths]}
    loads["messages"] = [load(MESSAGES_WORDS, messages) for messages in MESSAGES]
    sizes = {
        name: [prompt_tokens(target, point) for point in points] for name, points in loads.items()
    }
    await meter.per_request(target, load(100, 1))  # to warm up
    for number in range(rounds):
        for name in sweeps.keys() & loads.keys():
            for point, size in zip(loads[name], sizes[name], strict=True):
                x = size if name == "prompt" else point.messages
                say(f"round {number + 1} of {rounds}: {name} {x}")
                found = await meter.per_request(target, point)
                if name == "messages":
                    found["prompt_tokens"] = size
                sweeps[name].note(x, **found)


# --- Showing -------------------------------------------------------------------------------------


def shape(sweep: Sweep) -> str:
    """Whether the medians are flat, or on a line, in words with numbers."""
    name = "us_per_token" if sweep.flat else "us_per_request"
    places, values = sweep.medians(name)
    if len(places) < 3:
        return "too few points to tell"
    if sweep.flat:
        base = BESIDE if BESIDE in places else places[0]
        ratio = values[-1] / values[places.index(base)]
        judged = "flat" if ratio <= FLAT else "NOT FLAT"
        return f"{judged}: at {places[-1]} {ratio:.2f} times that at {base}"
    slope, start_ = statistics.linear_regression(places, values)
    off = max(abs(y - start_ - slope * x) / y for x, y in zip(places, values, strict=True))
    judged = "linear" if off <= FLAT - 1 else "NOT LINEAR"
    return (
        f"{judged}: {start_:.0f} + {slope:.3g} us for each of {sweep.x}; at most {off:.0%} off that"
    )


def show(sweep: Sweep) -> None:
    """Print the table and the shape of `sweep`."""
    names = list(next(iter(sweep.found.values())))
    rows = [[sweep.x, *names]]
    for x in sorted(sweep.found):
        rows.append([str(x), *(spread(sweep.found[x][name]) for name in names)])
    print(f"{sweep.title}:\n\n{table(rows)}\n\n{shape(sweep)}\n")


def plot(sweeps: dict[str, Sweep], file: Path, note: str) -> None:
    """Draw all sweeps into the PNG `file`."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    panels = []
    for sweep in sweeps.values():
        panels.append((sweep, "us_per_token" if sweep.flat else "us_per_request", "us of CPU"))
        if sweep.flat:
            panels.append((sweep, "itl_p99_ms", "p99 between tokens, ms"))
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure, axes = pyplot.subplots(
        rows, columns, figsize=(4.5 * columns, 3.5 * rows), squeeze=False
    )
    for axis in axes.flat[len(panels) :]:
        axis.set_axis_off()
    for axis, (sweep, name, label) in zip(axes.flat, panels, strict=False):
        places, values = sweep.medians(name)
        low = [min(sweep.found[x][name]) for x in places]
        high = [max(sweep.found[x][name]) for x in places]
        axis.fill_between(places, low, high, alpha=0.25)
        axis.plot(places, values, marker="o")
        axis.set(title=sweep.title.replace(", by", ",\nby"), xlabel=sweep.x, ylabel=label)
        axis.title.set_fontsize(9)
        if sweep.flat:
            axis.set_xscale("log")
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
    figure.suptitle(note, fontsize=10)
    figure.tight_layout()
    figure.savefig(file, dpi=110)


async def main(args: argparse.Namespace) -> int:
    sweeps = {name: Sweep(*SWEEPS[name]) for name in SWEEPS if name in args.sweeps}
    meter = Meter(args.tokens)
    async with AsyncExitStack() as stack:
        counts = sorted(set(args.streams))
        options = [
            "--set", "limits.max_requests=4096", "--set", "limits.max_queue_seconds=1000",
            "--engine", f"max_num_seqs={args.max_num_seqs}",
        ]  # fmt: skip
        target = await stack.enter_async_context(start("synthia", *options))
        with suppress(PermissionError):  # the engine would take every core there is
            os.setpriority(os.PRIO_PROCESS, 0, -10)
        rest = await at_rest(target)
        await measure_streams(sweeps, meter, target, counts, args.rounds)
        await measure_prompts(sweeps, meter, target, args.rounds)
    say("")
    note = f"vLLM, demo model; CPU of the API process; median (range) of {args.rounds} rounds."
    print(f"{note} At rest it takes {rest:.2%} of a core.\n")
    for sweep in sweeps.values():
        show(sweep)
    if args.plot:
        args.plot.mkdir(parents=True, exist_ok=True)
        plot(sweeps, args.plot / "scale.png", note)
    if args.json:
        document = {
            "environment": machine(),
            "rounds": args.rounds,
            "at_rest": rest,
            "sweeps": {
                name: {"title": s.title, "x": s.x, "shape": shape(s), "found": s.found}
                for name, s in sweeps.items()
            },
        }
        write_json(args.json, document)
    return 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sweeps", nargs="+", choices=SWEEPS, default=list(SWEEPS))
    parser.add_argument("--streams", nargs="+", type=int, default=STREAMS, metavar="N")
    parser.add_argument("--tokens", type=int, default=128, help="of a stream, where it is among 16")
    parser.add_argument(
        "--max-num-seqs", type=int, default=1000, help="streams that decode at the same time"
    )
    parser.add_argument("--rounds", type=int, default=3, help="of each measurement")
    parser.add_argument("--plot", type=Path, metavar="DIR", help="draw the curves into this folder")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers here, too")
    sys.exit(uvloop.run(main(parser.parse_args())))
