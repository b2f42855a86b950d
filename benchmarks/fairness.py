"""Does one user's flood make another's first token late, and are shares what the weights say?

A flood keeps a long queue in front of the engine; a light user sends a request now and then. Its
time to first token is measured alone, beside the flood with fair shares, and beside it first come,
first served. Then two users who both always have requests waiting share by weight.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import time
from pathlib import Path
from typing import Any

from lib.client import Outcome, Target, environment, serve
from lib.report import percentile, say, table, write_json

from synthia_vllm.admission.fair_share import ANSWER_COST, PROMPT_COST

EXAMPLES = """\
examples:
  python benchmarks/fairness.py
  python benchmarks/fairness.py --seconds 120 --json fairness.json

Each part starts a server of its own with the demo model and a batch of 8, so that there is a queue.
"""
OPTIONS = (
    "--engine", "max_num_seqs=8", "--set", "limits.max_queue_seconds=1000",
    "--set", "limits.max_requests=1000",
)  # fmt: skip
FLOOD = 80  # requests in flight: ten times the batch
QUESTIONS = ("What is an orca?", "How do I make pancakes?", "Why is the sky blue?", "Hello!")


def body(draw: random.Random, tokens: int) -> dict[str, Any]:
    return {
        "model": "synthia-demo",
        "messages": [{"role": "user", "content": f"{draw.choice(QUESTIONS)} {draw.random()}"}],
        "max_tokens": tokens,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


async def backlog(target: Target, user: str, size: int, until: float, seen: list[Outcome]) -> None:
    """Keep `size` requests of `user` in flight until `until`."""
    draw = random.Random(user)

    async def one_after_the_other() -> None:
        while time.monotonic() < until:
            outcome = await target.chat(body(draw, draw.randint(20, 80)), user)
            if time.monotonic() < until:
                seen.append(outcome)

    await asyncio.gather(*(one_after_the_other() for _ in range(size)))


async def light(target: Target, until: float) -> list[Outcome]:
    """A request of the light user about each second, at random moments."""
    draw = random.Random("light")
    seen: list[Outcome] = []
    running = []

    async def one() -> None:
        seen.append(await target.chat(body(draw, 16), "light"))

    while time.monotonic() < until:
        running.append(asyncio.create_task(one()))
        await asyncio.sleep(draw.expovariate(1.0))
        say(f"light user: {len(seen)} answered")
    await asyncio.gather(*running)
    return seen


async def one_run(flood: bool, seconds: float, *options: str) -> dict[str, Any]:
    """The light user's times to first token, with or without the flood."""
    async with serve(*OPTIONS, *options, users={"flood": {}, "light": {}}) as target:
        until = time.monotonic() + seconds
        other: list[Outcome] = []
        jobs = [asyncio.create_task(backlog(target, "flood", FLOOD, until, other))] if flood else []
        if flood:
            await asyncio.sleep(3)  # until there is a queue
        seen = await light(target, until)
        await asyncio.gather(*jobs)
        first = [o.to_first for o in seen if o.to_first is not None]
        return {
            "requests": len(seen),
            "refused": sum(o.status != 200 for o in seen),
            "p50_ms": 1e3 * percentile(first, 0.5),
            "p99_ms": 1e3 * percentile(first, 0.99),
            "flood_p50_ms": 1e3 * percentile([o.to_first for o in other if o.to_first], 0.5),
            "environment": await environment(target),
        }


async def shares(weights: tuple[float, float], seconds: float) -> dict[str, Any]:
    """The ratio of tokens served to two users with `weights`, both with a backlog."""
    users = {"a": {"weight": weights[0]}, "b": {"weight": weights[1]}}
    async with serve(*OPTIONS, users=users) as target:
        until = time.monotonic() + seconds
        seen: dict[str, list[Outcome]] = {"a": [], "b": []}
        jobs = [asyncio.create_task(backlog(target, u, 24, until, seen[u])) for u in users]
        # Counted while both have a backlog: from a quarter of the time to its end.
        await asyncio.sleep(seconds / 4)
        start = await served(target)
        await asyncio.sleep(max(0.0, until - time.monotonic() - 0.5))
        end = await served(target)
        await asyncio.gather(*jobs)
    got = {user: end[user] - start[user] for user in users}
    return {"weights": weights, "tokens": got, "ratio": got["a"] / got["b"]}


async def served(target: Target) -> dict[str, float]:
    """The cost of what was served so far, as the server counts it."""
    found = await target.metrics()

    def tokens(user: str, kind: str) -> float:
        return found.get(f'synthia_user_tokens_total{{kind="{kind}",user="{user}"}}', 0.0)

    return {
        user: PROMPT_COST * tokens(user, "prompt") + ANSWER_COST * tokens(user, "answer")
        for user in ("a", "b")
    }


async def main(args: argparse.Namespace) -> None:
    runs = {
        "alone": await one_run(False, args.seconds),
        "beside a flood, fair shares": await one_run(True, args.seconds),
        "beside a flood, first come first served": await one_run(
            True, args.seconds, "--engine", "scheduling_policy=fcfs"
        ),
    }
    say("")
    rows: list[list[object]] = [
        [
            "light user",
            "requests",
            "refused",
            "TTFT p50 ms",
            "p99 ms",
            "p99 / alone",
            "flood p50 ms",
        ]
    ]
    alone = runs["alone"]["p99_ms"]
    for name, run in runs.items():
        rows.append(
            [name, run["requests"], run["refused"], f"{run['p50_ms']:.0f}", f"{run['p99_ms']:.0f}",
             f"{run['p99_ms'] / alone:.1f}", f"{run['flood_p50_ms']:.0f}"]
        )  # fmt: skip
    print(table(rows), "\n")
    ratios = [await shares(weights, args.seconds) for weights in ((1.0, 1.0), (3.0, 1.0))]
    say("")
    print(
        table(
            [["weights", "tokens served", "ratio"]]
            + [
                [f"{r['weights'][0]:g}:{r['weights'][1]:g}", r["tokens"], f"{r['ratio']:.2f}"]
                for r in ratios
            ]
        )
    )
    if args.json:
        write_json(args.json, {"light": runs, "shares": ratios})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=60, help="of load in each part")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers here, too")
    asyncio.run(main(parser.parse_args()))
