"""The same load on this server, on `vllm serve`, on vLLM without a server, and on the card's loop.

All of them are started once and then measured in turn, round after round, so that a slow minute
of the machine meets all of them. Ratios are taken within a round. While one is measured the others
should be idle; the CPU time they take all the same is reported.

- offline: `vllm.LLM.generate` with the token ids of the same prompts, all at once: the limit;
- transformers: the loop of the model's card, one answer at a time however many users wait.

Answers have exactly `--tokens` tokens everywhere. Times are the client's: TTFT from sending to
the first event with text in it, ITL between two events of an answer. Offline has neither. The
loop's TTFT is the time of a whole answer, which is when its user sees the first word.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Final

import psutil
import uvloop
from lib.byte_client import Load
from lib.contestants import DIRECT, Measured, begin, same_prompts, take
from lib.report import machine, percentile, say, spread, table, write_json
from lib.servers import available, heed_sigterm

EXAMPLES = """\
examples:
  python benchmarks/compare.py                                 everything that can be had here
  python benchmarks/compare.py --streams 64 --rounds 5 --json compare.json --plot compare.png
  python benchmarks/compare.py --targets synthia offline       only against the limit
  VLLM_RUST_FRONTEND_PATH=/path/to/vllm-rs python benchmarks/compare.py
"""
# What an engine and its API take beside the KV cache, in GiB; measured with the demo model.
ENGINE_GIB: Final = 2.2
Figures = dict[str, float]


def figures(measured: Measured) -> Figures:
    """The numbers of one load on one target; those that it cannot have are left out."""
    found = {
        "tokens_per_second": measured.tokens / measured.seconds,
        "ttft_p50_ms": 1e3 * percentile(measured.firsts, 0.5),
        "ttft_p99_ms": 1e3 * percentile(measured.firsts, 0.99),
        "itl_p50_ms": 1e3 * percentile(measured.gaps, 0.5),
        "itl_p99_ms": 1e3 * percentile(measured.gaps, 0.99),
        "client_busy": measured.client_cpu / measured.seconds,
        "idle_cpu": measured.idle_cpu,
    }
    return {name: value for name, value in found.items() if math.isfinite(value)}


Results = dict[str, dict[int, list[Figures]]]
"""By target and number of streams, the figures of each round."""


def over(results: Results, name: str, other: str, streams: int, what: str) -> list[float]:
    """Of each round, `what` of `name` as a multiple of `other`'s; none if one has no such figure.

    The loop's answers come one by one, so its pace does not depend on the number of streams.
    """
    mine = results[name].get(streams, [])
    its = (
        results[other][min(results[other])] if other == "transformers" else results[other][streams]
    )
    pairs = zip(mine, its, strict=True)
    return [a[what] / b[what] for a, b in pairs if what in a and b.get(what)]


def comparisons(results: Results) -> dict[str, dict[int, list[float]]]:
    """Each ratio that can be had, by its name and the number of streams."""
    served = [name for name in results if name not in DIRECT]
    wanted: list[tuple[str, str, str]] = [
        (name, other, "tokens_per_second")
        for other in DIRECT
        if other in results
        for name in served
    ]
    frontends = [name for name in served if name != "synthia"] if "synthia" in served else []
    kinds = ("tokens_per_second", "ttft_p50_ms", "ttft_p99_ms", "itl_p50_ms", "itl_p99_ms")
    wanted += [("synthia", other, what) for other in frontends for what in kinds]
    return {
        f"{name} / {other}, {what}": {
            streams: over(results, name, other, streams, what) for streams in results[name]
        }
        for name, other, what in wanted
    }


def report(results: Results) -> str:
    """The results as Markdown: a table of figures, then one of ratios; median and range."""
    heads = ["tokens_per_second", "ttft_p50_ms", "ttft_p99_ms", "itl_p50_ms", "itl_p99_ms"]
    heads += ["client_busy", "idle_cpu"]
    rows = [["streams", "target", *heads]]
    levels = sorted({streams for kinds in results.values() for streams in kinds})
    for streams in levels:
        for name, kinds in results.items():
            if streams in kinds:
                cells = [[one[what] for one in kinds[streams] if what in one] for what in heads]
                rows.append([str(streams), name, *(spread(c) if c else "" for c in cells)])
    ratios = [["ratio", *(f"{streams} streams" for streams in levels)]]
    for name, by_streams in comparisons(results).items():
        found = [by_streams.get(streams) for streams in levels]
        ratios.append([name, *(spread(values) if values else "" for values in found)])
    return table(rows) + "\n\n" + table(ratios)


def plot(results: Results, file: Path) -> None:
    """Bars of tokens a second, with their range over the rounds, for each number of streams."""
    from matplotlib.figure import Figure

    levels = sorted({streams for kinds in results.values() for streams in kinds})
    figure = Figure(figsize=(9, 4.5), layout="constrained")
    axes = figure.add_subplot()
    width = 0.8 / len(results)
    for place, (name, kinds) in enumerate(results.items()):
        rounds = [[one["tokens_per_second"] for one in kinds[level]] for level in kinds]
        middles = [statistics.median(values) for values in rounds]
        low = [middle - min(values) for middle, values in zip(middles, rounds, strict=True)]
        high = [max(values) - middle for middle, values in zip(middles, rounds, strict=True)]
        x = [levels.index(level) + (place - (len(results) - 1) / 2) * width for level in kinds]
        axes.bar(x, middles, width, yerr=[low, high], label=name, capsize=2)
    axes.set_xticks(range(len(levels)), [str(level) for level in levels])
    axes.set_xlabel("streams at the same time")
    axes.set_ylabel("tokens per second")
    axes.legend()
    figure.savefig(file, dpi=150)


def loads(args: argparse.Namespace) -> list[Load]:
    """One for each number of streams: each stream has the same number of answers, one by one."""
    return [
        Load("stream", streams, streams * max(1, -(-args.answers // streams)), args.tokens, True)
        for streams in sorted(set(args.streams))
    ]


async def main(args: argparse.Namespace) -> int:
    heed_sigterm()
    needed = len(args.targets) * (ENGINE_GIB + args.kv_cache_mib / 1024)
    free = psutil.virtual_memory().available / 2**30
    if free < needed:
        raise SystemExit(
            f"This would take about {needed:.0f} GiB of memory, {free:.0f} GiB are available. "
            "Name fewer --targets, or take less for each --kv-cache-mib."
        )
    results: Results = {}
    async with AsyncExitStack() as stack:
        everyone = await begin(args.targets, args.kv_cache_mib * 2**20, stack)
        results |= {name: {} for name in args.targets}
        prompt_tokens = await same_prompts(everyone, loads(args)[0])
        offset = 1
        for number in range(-1, args.rounds):  # the first warms up and does not count
            for load in loads(args):
                for one in everyone if number % 2 else everyone[::-1]:
                    name = one.running.name
                    if name == "transformers" and load.connections > min(args.streams):
                        continue  # it would only take longer
                    which = f"round {number + 1} of {args.rounds}" if number >= 0 else "warming up"
                    say(f"{which}: {load.connections} streams on {name}")
                    others = [other for other in everyone if other is not one]
                    measured = await take(one, load, offset, others)
                    offset += load.requests
                    if number >= 0:
                        known = results[name].setdefault(load.connections, [])
                        known.append(figures(measured))
        say("")
    print(report(results))
    if args.plot:
        plot(results, args.plot)
    if args.json:
        document = {
            "environment": machine(),
            "load": {k: v for k, v in vars(args).items() if k not in ("json", "plot")}
            | {"prompt_tokens": prompt_tokens},
            "targets": results,
            "ratios": comparisons(results),
        }
        write_json(args.json, document)
    return 0


if __name__ == "__main__":
    everything = [*available(), *DIRECT]
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--targets", nargs="+", choices=everything, default=everything)
    parser.add_argument(
        "--streams", nargs="+", type=int, default=[1, 16, 64], help="at the same time"
    )
    parser.add_argument("--tokens", type=int, default=128, help="of each answer")
    parser.add_argument(
        "--answers", type=int, default=4, help="at least, for few streams: one after the other"
    )
    parser.add_argument("--rounds", type=int, default=3, help="that count, after a warm-up")
    parser.add_argument(
        "--kv-cache-mib", type=int, default=1024, help="of each engine (default 1024)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers here, too")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw tokens/s into this PNG")
    sys.exit(uvloop.run(main(parser.parse_args())))
