"""The ceiling of each frontend: what it delivers of an engine that runs no model.

This server and both frontends of `vllm serve`, each over vLLM's own engine core with an executor
that gives every request one token a step (`lib/executor.py`). They take their turn: three engines
do not fit beside a load where cores are few. CPU time is that of the API processes, by their own
clocks, taken while all streams stream; only ratios within one run mean much.

- offered: the tokens of a second, if no step is late; delivered: those that reached the client;
- between chunks: what a reader sees. A chunk can hold several tokens;
- keeps up: delivered is at least 95 % of offered, and 99 % of the times between chunks are at most
  one step longer than the tokens of a chunk take. The most of all that keeps up is where a frontend
  saturates;
- client: its share of a core, and its longest stall. Where the first nears 1, it was the limit.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

import uvloop
from lib.meter import Meter, NeverTogetherError, Talk
from lib.report import machine, say, spread, table, write_json
from lib.servers import STEP_MS, available, heed_sigterm, start

EXAMPLES = """\
examples:
  python benchmarks/ceiling.py --plot ceiling.png --json ceiling.json
  python benchmarks/ceiling.py --targets synthia vllm-rust --streams 64 256 --rounds 1
  python benchmarks/ceiling.py --stream-interval 2         chunks of two tokens for everybody
  python benchmarks/ceiling.py --workers 2 --targets synthia vllm-python      two API processes
  VLLM_RUST_FRONTEND_PATH=/path/to/vllm-rs python benchmarks/ceiling.py
"""
EXECUTOR: Final = "lib.executor.PacedExecutor"
PLACES: Final = 2048
"""Streams that an engine takes at once: the same for every run."""
EACH_TOKEN: Final = "synthia, each token"
"""This server without its pace."""
Figures = dict[str, list[float]]
"""By name, a value for each round."""


def options(target: str, args: argparse.Namespace) -> list[str]:
    """What `target` is started with."""
    places, interval = str(PLACES), args.stream_interval
    if not target.startswith("synthia"):
        flags = ["--distributed-executor-backend", EXECUTOR, "--max-num-seqs", places]
        if interval is not None:
            flags += ["--stream-interval", str(interval)]
        if args.workers > 1:
            flags += ["--api-server-count", str(args.workers)]
        return flags
    flags = ["--engine", f"distributed_executor_backend={EXECUTOR}"]
    flags += ["--engine", f"max_num_seqs={places}"]
    flags += ["--set", "limits.max_requests=4096", "--set", "limits.max_queue_seconds=1000"]
    flags += ["--set", f"api_workers={args.workers}"]
    if interval is not None:
        flags += ["--engine", f"stream_interval={interval}"]
    if target == EACH_TOKEN or interval is not None:
        flags += ["--set", "stream_pace_ms=0"]
    return flags


async def measure(target: str, args: argparse.Namespace, found: dict[int, Figures]) -> None:
    """Start `target`, and put its figures for each number of streams into `found`."""
    meter = Meter(args.tokens, word=False)  # all answers are of that one word, unasked

    async def stream(streams: int) -> dict[str, float]:
        say(f"{target}: {streams} streams")
        # None must have ended before the last has begun, which takes long where many begin.
        seen = await meter.per_token(running, streams, max(args.tokens, streams))
        if args.step_ms:
            seen["offered"] = streams * 1000 / args.step_ms
            seen["longest_gap_steps"] = seen["longest_gap_ms"] / args.step_ms
        seen["memory_mib"] = memory()
        return seen

    def memory() -> float:
        """Of the API processes; what they share counts once."""
        return float(sum(api.memory_full_info().pss for api in running.api)) / 2**20

    def note(streams: int, seen: dict[str, float]) -> None:
        for name, value in seen.items():
            found.setdefault(streams, {}).setdefault(name, []).append(value)

    name = target.partition(",")[0]
    async with start(name, *options(target, args), api_processes=args.workers) as running:
        say(f"{target}: warming up")
        await meter.per_token(running, 16, args.tokens)
        for streamed in (True, False):
            await meter.per_request(running, Talk("request", 16, 64, 1, streamed, word=False))
        # The client must not be what waits for a core; but the servers take it after it.
        with suppress(PermissionError):
            os.setpriority(os.PRIO_PROCESS, 0, -10)
        try:
            before = memory()
            for streams in args.streams:
                try:
                    seen = await stream(streams) | {"memory_before_mib": before}
                except NeverTogetherError:  # so far behind that the last ones wait for the first
                    print(f"{target}: {streams} streams never stream together.", file=sys.stderr)
                    continue
                count = streams * min(64, max(1, args.requests // streams))
                for kind, streamed in (("streamed", True), ("plain", False)):
                    load = Talk("request", streams, count, 1, streamed, word=False)
                    cost = await meter.per_request(running, load)
                    seen[f"{kind}_us_per_request"] = cost["us_per_request"]
                load = Talk("answer", streams, streams, args.tokens, False, word=False)
                whole = (await meter.per_request(running, load))["us_per_request"]
                seen["plain_us_per_token"] = (whole - cost["us_per_request"]) / (args.tokens - 1)
                note(streams, seen)
            if args.saturation and args.step_ms:
                low, high = bounds(found, args.step_ms)
                while low and high > 1.1 * low:
                    middle = (low + high) // 2
                    note(middle, await stream(middle))
                    low, high = bounds(found, args.step_ms)
        finally:
            with suppress(PermissionError):
                os.setpriority(os.PRIO_PROCESS, 0, 0)
    say("")


def bounds(found: dict[int, Figures], step_ms: float) -> tuple[int, int]:
    """The most streams that were kept up with, and the fewest above that which were not; or 0."""
    kept = max((n for n, figures in found.items() if keeps_up(figures, step_ms)), default=0)
    return kept, min((n for n in found if n > kept), default=0)


def keeps_up(figures: Figures, step_ms: float) -> bool:
    """Whether all that is offered comes, and in time."""
    middle = {name: statistics.median(values) for name, values in figures.items()}
    late = middle["itl_p99_ms"] > (middle["tokens_per_event"] + 1) * step_ms
    return not late and middle["tokens_per_second"] >= 0.95 * middle["offered"]


def report(results: dict[str, dict[int, Figures]], step_ms: float) -> str:
    """The figures as Markdown, median and range; and where each saturates."""
    names = list(dict.fromkeys(n for t in results.values() for f in t.values() for n in f))
    rows = [["streams", "target", *names]]
    for streams in sorted({streams for by_streams in results.values() for streams in by_streams}):
        for target, by_streams in results.items():
            if streams in by_streams:
                figures = by_streams[streams]
                cells = [spread(figures[name]) if name in figures else "" for name in names]
                rows.append([str(streams), target, *cells])
    lines = [table(rows)]
    if step_ms:
        lines.append("")
        for target, by_streams in results.items():
            kept, failed = bounds(by_streams, step_ms)
            most = f"{kept * 1000 / step_ms:.0f} tokens/s" if kept else "none of these"
            less = f", and not with {failed * 1000 / step_ms:.0f}" if failed else ""
            lines.append(f"{target} keeps up with {most}{less}.")
    return "\n".join(lines)


def plot(results: dict[str, dict[int, Figures]], streams: list[int], file: Path) -> None:
    """Draw what is delivered of what is offered, and what a token costs, into the PNG `file`.

    The cost with so many `streams` alone: what was looked at to find where a target saturates is
    more noise than line.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    delivered, cost = figure.subplots(1, 2)
    most = max(max(f["offered"]) for by_streams in results.values() for f in by_streams.values())
    delivered.plot([0, most], [0, most], color="0.6", linestyle=":", label="all that is offered")
    for target, by_streams in results.items():
        middle = {
            name: {n: statistics.median(figures[name]) for n, figures in sorted(by_streams.items())}
            for name in ("offered", "tokens_per_second", "us_per_token")
        }
        style: dict[str, Any] = {"marker": "o", "markersize": 4, "label": target}
        x, y = (list(middle[name].values()) for name in ("offered", "tokens_per_second"))
        delivered.plot(x, y, **style)
        asked = [n for n in streams if n in by_streams]
        cost.plot(asked, [middle["us_per_token"][n] for n in asked], **style)
    delivered.set(xlabel="offered, tokens a second", ylabel="delivered, tokens a second")
    cost.set(xlabel="streams at the same time", ylabel="CPU of the API process, µs a token")
    cost.set(xscale="log", yscale="log", xticks=streams, xticklabels=streams)
    for axes in (delivered, cost):
        axes.grid(color="0.9")
        axes.legend(fontsize=8, frameon=False)
    figure.savefig(file, dpi=150)


async def main(args: argparse.Namespace) -> int:
    heed_sigterm()
    if args.plot and not args.step_ms:
        raise SystemExit(
            "--plot shows what is offered, and with --step-ms 0 there is no such rate."
        )
    if args.workers > 1 and "vllm-rust" in args.targets:
        raise SystemExit("The Rust frontend is one process: name other --targets with --workers.")
    # For the engine core, which loads the executor by its name.
    os.environ[STEP_MS] = str(args.step_ms)
    path = [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, path))
    results: dict[str, dict[int, Figures]] = {target: {} for target in args.targets}
    for number in range(args.rounds):
        # Back and forth, so that a machine that gets slower is not one target's alone.
        for target in args.targets if number % 2 == 0 else args.targets[::-1]:
            await measure(target, args, results[target])
            if args.json:  # after each: what has been measured is not lost with what fails
                load = {k: v for k, v in vars(args).items() if k not in ("json", "plot")}
                write_json(args.json, {"environment": machine(), "load": load, "targets": results})
    print(report(results, args.step_ms))
    if args.plot:
        plot(results, args.streams, args.plot)
    return 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    everything = [*available(), EACH_TOKEN]
    parser.add_argument("--targets", nargs="+", choices=everything, default=everything)
    parser.add_argument("--streams", nargs="+", type=int, default=[1, 16, 64, 256, 1024])
    parser.add_argument("--step-ms", type=float, default=10.0, help="0: as fast as it can")
    parser.add_argument("--tokens", type=int, default=400, help="of each stream, or more")
    parser.add_argument("--requests", type=int, default=1024, help="for one token, at least")
    parser.add_argument("--stream-interval", type=int, metavar="N", help="tokens to a chunk")
    parser.add_argument(
        "--saturation", action="store_true", help="look between --streams for the most it keeps up"
    )
    parser.add_argument("--workers", type=int, default=1, help="API processes (default 1)")
    parser.add_argument("--rounds", type=int, default=2, help="of each measurement (default 2)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers here, too")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw them into this PNG")
    sys.exit(uvloop.run(main(parser.parse_args())))
