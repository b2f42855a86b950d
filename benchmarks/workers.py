"""What several API processes cost, and how evenly they share: CPU by number of processes.

The same load goes to servers of this kind that differ in `api_workers` alone. On a machine with
few cores the engine is what limits, so the tokens per second say little; what counts is whether a
token and a request cost the same CPU however many processes share them, what the one that keeps
the accounts takes, and how much of the work the busiest process has.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path
from typing import Any

import uvloop
from lib.byte_client import Load, offer
from lib.report import machine, say, spread, table, write_json
from lib.servers import Running, cpu_seconds, heed_sigterm, start

EXAMPLES = """\
examples:
  python benchmarks/workers.py                       1, 2 and 4 API processes
  python benchmarks/workers.py --workers 1 8 --connections 256 --json workers.json
"""


def shares(target: Running, before: dict[int, float]) -> tuple[float, float]:
    """Of the CPU since `before`: the supervisor's part, and the busiest's over the mean."""
    used = {process.pid: cpu_seconds(process.pid) - before[process.pid] for process in target.api}
    if len(used) == 1:
        return 0.0, 1.0
    supervisor = used.pop(target.process.pid)
    return supervisor / (supervisor + sum(used.values())), max(used.values()) * len(used) / sum(
        used.values()
    )


async def measure(workers: int, args: argparse.Namespace) -> dict[str, list[float]]:
    """The numbers of `workers` API processes, one for each round."""
    count = args.connections
    loads = {
        "token": Load("stream", count, count, args.tokens, True),
        "request": Load("request", count, count * args.repeats, 1, True),
    }
    numbers: dict[str, list[float]] = {}
    offset = 0
    async with start("synthia", "--api-workers", str(workers)) as target:
        for number in range(-1, args.rounds):  # the first warms up and does not count
            for unit, load in loads.items():
                say(f"{workers} API processes: {unit}s, round {number + 1} of {args.rounds}")
                before = {process.pid: cpu_seconds(process.pid) for process in target.api}
                found = await offer(target, load, offset)
                offset += load.requests
                if number < 0:
                    continue
                supervisor, busiest = shares(target, before)
                units = found.tokens if unit == "token" else found.answered
                for what, value in (
                    (f"us_per_{unit}", 1e6 * found.api_cpu / units),
                    (f"{unit}s_per_second", units / found.seconds),
                    (f"supervisor_share_{unit}s", supervisor),
                    (f"busiest_over_mean_{unit}s", busiest),
                ):
                    numbers.setdefault(what, []).append(value)
    say("")
    return numbers


async def main(args: argparse.Namespace) -> int:
    heed_sigterm()
    found: dict[str, dict[str, list[float]]] = {}
    for workers in args.workers:
        found[str(workers)] = await measure(workers, args)
    names = list(found)
    rows = [["API processes", *names]]
    rows += [[what, *(spread(found[name][what]) for name in names)] for what in found[names[0]]]
    print(table(rows))
    if args.json:
        document: dict[str, Any] = {
            "environment": machine(),
            "load": {key: value for key, value in vars(args).items() if key != "json"},
            "workers": {
                name: {what: statistics.median(values) for what, values in numbers.items()}
                for name, numbers in found.items()
            },
            "rounds": found,
        }
        write_json(args.json, document)
    return 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4], metavar="N")
    parser.add_argument("--connections", type=int, default=128, help="at the same time")
    parser.add_argument("--tokens", type=int, default=64, help="of each long answer")
    parser.add_argument("--repeats", type=int, default=8, help="one-token requests a connection")
    parser.add_argument("--rounds", type=int, default=3, help="that count, after a warm-up")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers here, too")
    sys.exit(uvloop.run(main(parser.parse_args())))
