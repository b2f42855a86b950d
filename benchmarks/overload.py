"""What is left of a server's work when four times as much is asked of it?

First the sustainable load is measured: a closed loop as wide as the batch. Then requests come at
random moments (Poisson) at that rate, and at four times that rate. Goodput counts the answers that
were whole and whose first token came within the objective. Refusals must be quick and say when to
come back. The exit code is 1 if a target was missed.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import psutil
from lib.client import Outcome, Target, environment, serve
from lib.report import percentile, say, table, write_json

EXAMPLES = """\
examples:
  python benchmarks/overload.py
  python benchmarks/overload.py --seconds 20 --objective 1 --json overload.json

The load comes from the same machine: on few cores it takes some of the server's time.
"""
BATCH = 16
TOKENS = 48
USERS: dict[str, dict[str, Any]] = {f"user{i}": {} for i in range(4)}
WARM_UP_SECONDS = 5.0


def body(draw: random.Random) -> dict[str, Any]:
    return {
        "model": "synthia-demo",
        "messages": [{"role": "user", "content": f"What is an orca? {draw.random()}"}],
        "max_tokens": TOKENS,
        "min_tokens": TOKENS // 2,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


async def sustainable(target: Target, seconds: float) -> float:
    """Requests a second that a closed loop as wide as the batch gets answered."""
    draw, begun = random.Random(0), time.monotonic()
    done: list[float] = []

    async def loop(user: str) -> None:
        while time.monotonic() < begun + seconds:
            await target.chat(body(draw), user)
            done.append(time.monotonic())

    await asyncio.gather(*(loop(f"user{i % len(USERS)}") for i in range(BATCH)))
    counted = [moment for moment in done if begun + 2 < moment < begun + seconds]
    return len(counted) / (seconds - 2)


async def offer(target: Target, rate: float, seconds: float) -> list[Outcome]:
    """Requests at random moments, `rate` a second, each waited for to its end."""
    draw, seen, begun = random.Random(1), [], time.monotonic()
    running: set[asyncio.Task[None]] = set()

    async def one(user: str) -> None:
        seen.append(await target.chat(body(draw), user))

    moment = 0.0
    while moment < seconds:
        await asyncio.sleep(max(0.0, begun + moment - time.monotonic()))
        job = asyncio.create_task(one(draw.choice(list(USERS))))
        running.add(job)
        job.add_done_callback(running.discard)
        moment += draw.expovariate(rate)
        say(f"{rate:.0f} requests/s: {moment:.0f} of {seconds:.0f} s, {len(running)} open")
    await asyncio.gather(*running)
    return seen


def judge(seen: list[Outcome], seconds: float, objective: float) -> dict[str, Any]:
    """The numbers of one run."""
    good = [o for o in seen if o.whole and o.to_first is not None and o.to_first <= objective]
    refused = [o for o in seen if o.status in (429, 503)]
    waits = [1e3 * o.to_status for o in refused]
    return {
        "offered_per_s": len(seen) / seconds,
        "goodput_per_s": len(good) / seconds,
        "refused": len(refused),
        "refused_without_retry_after": sum(o.retry_after is None for o in refused),
        "other": Counter(f"{o.status} {o.code}" for o in seen if not o.whole and o not in refused),
        "ttft_p50_ms": 1e3 * percentile([o.to_first for o in good if o.to_first], 0.5),
        "ttft_p99_ms": 1e3 * percentile([o.to_first for o in seen if o.to_first], 0.99),
        "refusal_p50_ms": percentile(waits, 0.5),
        "refusal_p99_ms": percentile(waits, 0.99),
    }


async def main(args: argparse.Namespace) -> int:
    options = (
        "--engine", f"max_num_seqs={BATCH}", "--set", f"limits.max_requests={3 * BATCH}",
        "--set", f"limits.max_queue_seconds={args.objective}",
    )  # fmt: skip
    async with serve(*options, users=USERS) as target:
        process = psutil.Process(target.process.pid)
        await sustainable(target, WARM_UP_SECONDS)
        rate = await sustainable(target, args.seconds / 2)
        before = process.memory_info().rss / 1e6
        runs = {}
        for load in (1, 4):
            seen = await offer(target, load * rate, args.seconds)
            runs[f"{load}x"] = judge(seen, args.seconds, args.objective)
            await asyncio.sleep(2)
        after = process.memory_info().rss / 1e6
        say("")
        names = list(runs["1x"])
        rows = [[load, *(_shown(run[name]) for name in names)] for load, run in runs.items()]
        print(table([["load", *names], *rows]), "\n")
        ratio = runs["4x"]["goodput_per_s"] / runs["1x"]["goodput_per_s"]
        checks = [
            ("goodput at 4x / at 1x, at least 0.9", f"{ratio:.2f}", ratio >= 0.9),
            ("p99 of a refusal, at most 100 ms", f"{runs['4x']['refusal_p99_ms']:.0f}",
             runs["4x"]["refusal_p99_ms"] <= 100),
            ("refusals without Retry-After", runs["4x"]["refused_without_retry_after"],
             not runs["4x"]["refused_without_retry_after"]),
            ("answers lost", dict(runs["4x"]["other"]), not runs["4x"]["other"]),
            ("MB of the server, before and after", f"{before:.0f} {after:.0f}",
             after <= 1.1 * before + 50),
        ]  # fmt: skip
        shown = [[name, value, "PASS" if ok else "FAIL"] for name, value, ok in checks]
        print(f"1x = {rate:.1f} requests/s; objective: first token within {args.objective:g} s")
        print(table([["check", "found", ""], *shown]))
        if args.json:
            found = {"environment": await environment(target), "1x_per_s": rate, "runs": runs}
            write_json(args.json, found)
        return 0 if all(ok for *_, ok in checks) else 1


def _shown(value: Any) -> str:
    if isinstance(value, Counter):
        return ", ".join(f"{what}: {times}" for what, times in value.items()) or "none"
    return f"{value:.1f}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=60, help="of load at 1x and at 4x")
    parser.add_argument("--objective", type=float, default=2, help="seconds to the first token")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers here, too")
    sys.exit(asyncio.run(main(parser.parse_args())))
