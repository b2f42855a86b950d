"""What the serving layer costs: CPU time of the API process alone, per token and per request.

The same requests go to this server and to both frontends of `vllm serve`, in turn, several times
over. CPU time is read from each process's own clock, so that the client, the engine and the noise
of the machine are accounted apart; only ratios within one run mean much.

- stream, plain: CPU per answer token of answers of one length, all requests at once;
- request: CPU of a request for one token, streamed; the number of connections stays the same.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from contextlib import AsyncExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import uvloop
from lib.byte_client import Found, Load, offer
from lib.report import machine, percentile, say, spread, table, write_json
from lib.servers import available, start

EXAMPLES = """\
examples:
  python benchmarks/edge.py                        every target that can be started here
  python benchmarks/edge.py --targets synthia vllm-python --rounds 5 --json edge.json
  VLLM_RUST_FRONTEND_PATH=/path/to/vllm-rs python benchmarks/edge.py
"""


def figures(results: dict[str, list[Found]]) -> dict[str, list[float]]:
    """The numbers of one target, one for each round."""

    def each(kind: str, value: Any) -> list[float]:
        return [value(found) for found in results[kind]]

    return {
        "stream_us_per_token": each("stream", lambda f: 1e6 * f.api_cpu / f.tokens),
        "plain_us_per_token": each("plain", lambda f: 1e6 * f.api_cpu / f.tokens),
        "us_per_request": each("request", lambda f: 1e6 * f.api_cpu / f.answered),
        "plain_us_per_request": each("plain request", lambda f: 1e6 * f.api_cpu / f.answered),
        "itl_p50_ms": each("stream", lambda f: 1e3 * percentile(f.gaps, 0.5)),
        "itl_p99_ms": each("stream", lambda f: 1e3 * percentile(f.gaps, 0.99)),
        "tokens_per_second": each("stream", lambda f: f.tokens / f.seconds),
        "client_us_per_token": each("stream", lambda f: 1e6 * f.client_cpu / f.tokens),
        "client_busy": each("stream", lambda f: f.client_cpu / f.seconds),
        "engine_us_per_token": each("stream", lambda f: 1e6 * f.engine_cpu / f.tokens),
    }


async def main(args: argparse.Namespace) -> int:
    count, rounds = args.streams, args.rounds
    loads = [
        Load("stream", count, count, args.tokens, True),
        Load("plain", count, count, args.tokens, False),
        Load("request", count, count * args.repeats, 1, True),
        Load("plain request", count, count * args.repeats, 1, False),
    ]
    results: dict[str, dict[str, list[Found]]] = {}
    async with AsyncExitStack() as stack:
        running = [await stack.enter_async_context(start(name)) for name in args.targets]
        results = {target.name: {load.kind: [] for load in loads} for target in running}
        offset = 0
        for number in range(-1, rounds):  # the first warms up and does not count
            for load in loads:
                for target in running:
                    which = f"round {number + 1} of {rounds}" if number >= 0 else "warming up"
                    say(f"{which}: {load.kind} on {target.name}")
                    found = await offer(target, load, offset)
                    offset += load.requests
                    if number >= 0:
                        results[target.name][load.kind].append(found)
        say("")
    numbers = {name: figures(kinds) for name, kinds in results.items()}
    medians = {
        name: {what: statistics.median(values) for what, values in found.items()}
        for name, found in numbers.items()
    }
    names = list(numbers)
    rows = [["", *names]]
    rows += [[what, *(spread(numbers[name][what]) for name in names)] for what in numbers[names[0]]]
    print(table(rows))
    baseline = "vllm-python" if "vllm-python" in names else names[0]
    print(f"\nRatios to {baseline}:\n")
    what_counts = ["stream_us_per_token", "plain_us_per_token", "us_per_request"]
    what_counts += ["plain_us_per_request", "itl_p99_ms", "tokens_per_second"]
    print(
        table(
            [["", *names]]
            + [
                [what, *(f"{medians[name][what] / medians[baseline][what]:.2f}" for name in names)]
                for what in what_counts
            ]
        )
    )
    if args.json:
        document = {
            "environment": machine(),
            "load": {k: v for k, v in vars(args).items() if k != "json"},
            "targets": medians,
            "rounds": numbers,
            "loads": [asdict(load) for load in loads],
        }
        write_json(args.json, document)
    return 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--targets", nargs="+", choices=available(), default=available())
    parser.add_argument("--streams", type=int, default=64, help="connections at the same time")
    parser.add_argument("--tokens", type=int, default=128, help="of each long answer")
    parser.add_argument("--repeats", type=int, default=4, help="one-token requests a connection")
    parser.add_argument("--rounds", type=int, default=3, help="that count, after a warm-up")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers here, too")
    sys.exit(uvloop.run(main(parser.parse_args())))
