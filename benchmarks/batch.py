"""Are batches as fast as vLLM offline, cheap, and do they leave users alone?

Three questions, one server: a batch's tokens a second beside `LLM.generate`'s on the same prompts,
in turn; what a light user waits for alone and beside a batch that never ends; the CPU that the API
process takes for a token of a batch and for one of a stream.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import aiohttp
from lib.byte_client import WORD
from lib.client import Outcome, Target, environment, serve
from lib.contestants import Direct, contestant
from lib.report import percentile, say, table, write_json
from lib.servers import cpu_seconds

EXAMPLES = """\
examples:
  python benchmarks/batch.py
  python benchmarks/batch.py --lines 4000 --rounds 5 --seconds 120 --json batch.json
  python benchmarks/batch.py --places 32 --share 0.1
"""
ROUTE = "/v1/completions"


def prompt(draw: random.Random, words: int) -> str:
    """A text of its own for each line: nothing of it is in the prefix cache."""
    return " ".join(f"{draw.randrange(10_000)}" for _ in range(words))


def asked(text: str, tokens: int) -> dict[str, Any]:
    """One line of a batch, which runs to its last token as `direct.py` has it run."""
    return {
        "model": "synthia-demo",
        "prompt": text,
        "max_tokens": tokens,
        "temperature": 0,
        "ignore_eos": True,
        "logit_bias": {WORD: 100},
        "stop": ["USER:"],
    }


async def begin(target: Target, texts: list[str], tokens: int) -> str:
    """Begin a batch of `texts`; return its id."""
    lines = "".join(
        json.dumps(
            {"custom_id": f"{n}", "method": "POST", "url": ROUTE, "body": asked(text, tokens)}
        )
        + "\n"
        for n, text in enumerate(texts)
    )
    form = aiohttp.FormData()
    form.add_field("purpose", "batch")
    form.add_field("file", lines.encode(), filename="lines.jsonl")
    async with target.session.post(f"{target.url}/v1/files", data=form) as response:
        file = await response.json()
    body = {"input_file_id": file["id"], "endpoint": ROUTE, "completion_window": "24h"}
    async with target.session.post(f"{target.url}/v1/batches", json=body) as response:
        return str((await response.json())["id"])


async def end(target: Target, batch: str) -> None:
    """Have a batch cancelled, and wait until nothing of it runs."""
    async with target.session.post(f"{target.url}/v1/batches/{batch}/cancel") as response:
        await response.read()
    while (await target.metrics())["synthia_batch_running"]:
        await asyncio.sleep(0.1)


async def run_batch(target: Target, texts: list[str], tokens: int) -> dict[str, float]:
    """Seconds from where the file has been looked at to the end, and the API process's CPU."""
    batch = await begin(target, texts, tokens)
    await until(target, batch, "in_progress", 0.02)
    begun, cpu = time.perf_counter(), cpu_seconds(target.process.pid)
    await until(target, batch, "completed", 0.1)
    seconds = time.perf_counter() - begun
    spent = cpu_seconds(target.process.pid) - cpu
    return {"seconds": seconds, "cpu": spent, "tokens": float(tokens * len(texts))}


async def until(target: Target, batch: str, status: str, pause: float) -> None:
    """Wait until the batch is that far; asked seldom, for asking costs CPU, too."""
    while True:
        async with target.session.get(f"{target.url}/v1/batches/{batch}") as response:
            is_now = await response.json()
        if is_now["status"] in (status, "completed"):
            return
        say(f"batch: {is_now['status']}, {is_now['request_counts']['completed']} lines")
        await asyncio.sleep(pause)


async def user(target: Target, seconds: float, draw: random.Random) -> dict[str, float]:
    """What a light user sees, who asks, reads, and asks again."""
    seen: list[Outcome] = []
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        body = {
            "model": "synthia-demo",
            "messages": [{"role": "user", "content": prompt(draw, 30)}],
            "max_tokens": 48,
            "min_tokens": 48,
            "stream": True,
        }
        seen.append(await target.chat(body, None))
        say(f"user: {len(seen)} answers")
        await asyncio.sleep(draw.expovariate(1 / 0.3))
    first = [o.to_first for o in seen if o.to_first is not None]
    gaps = [gap for o in seen for gap in o.gaps]
    return {
        "requests": len(seen),
        "ttft_p50_ms": 1e3 * percentile(first, 0.5),
        "ttft_p99_ms": 1e3 * percentile(first, 0.99),
        "itl_p50_ms": 1e3 * percentile(gaps, 0.5),
        "itl_p99_ms": 1e3 * percentile(gaps, 0.99),
    }


async def streams(target: Target, texts: list[str], tokens: int, places: int) -> dict[str, float]:
    """The API process's CPU for the same lines, streamed to `places` clients."""
    cpu = cpu_seconds(target.process.pid)
    waiting = list(texts)

    async def client() -> None:
        while waiting:
            body = asked(waiting.pop(), tokens) | {"stream": True}
            async with target.session.post(f"{target.url}{ROUTE}", json=body) as response:
                async for _ in response.content.iter_any():
                    pass

    await asyncio.gather(*(client() for _ in range(places)))
    return {"cpu": cpu_seconds(target.process.pid) - cpu, "tokens": float(tokens * len(texts))}


async def main(args: argparse.Namespace) -> None:
    draw = random.Random(args.seed)
    tokens: int = args.tokens
    result: dict[str, Any] = {}

    def texts(count: int) -> list[str]:
        return [prompt(draw, 16) for _ in range(count)]

    with tempfile.TemporaryDirectory(prefix="batches-") as place:
        options = (
            "--engine", f"max_num_seqs={args.places}", "--set", f"batches.directory={place}",
            "--set", f"batches.beside_users={args.share}",
        )  # fmt: skip
        async with serve(*options) as target:
            result["environment"] = await environment(target)
            if args.rounds:
                async with contestant("offline", {"max_num_seqs": args.places}) as direct:
                    assert isinstance(direct, Direct)
                    result["rounds"] = await speed(target, direct, args, texts)
            alone = await user(target, args.seconds, draw)
            batch = await begin(target, texts(200_000), tokens)
            await until(target, batch, "in_progress", 0.5)
            await asyncio.sleep(6)  # the user who was there before is forgotten
            beside = await user(target, args.seconds, draw)
            await end(target, batch)
            result |= {"alone": alone, "beside": beside}
            streamed = await streams(target, texts(args.lines), tokens, args.places)
            await asyncio.sleep(6)
            batched = await run_batch(target, texts(args.lines), tokens)
            result["cpu_us"] = {
                name: 1e6 * run["cpu"] / run["tokens"]
                for name, run in (("streamed", streamed), ("batch", batched))
            }
    report(result)
    if args.json:
        write_json(args.json, result)


async def speed(
    target: Target, direct: Direct, args: argparse.Namespace, texts: Any
) -> list[dict[str, float]]:
    """Tokens a second of both, in turn, on the same prompts; the first round warms up."""
    rounds = []
    for number in range(args.rounds + 1):
        lines = texts(args.lines if number else args.lines // 4)
        batch = await run_batch(target, lines, args.tokens)
        say(f"round {number}: LLM.generate")
        plain = await direct.ask(lines, args.tokens, True)
        if number:
            rounds.append(
                {
                    "batch": batch["tokens"] / batch["seconds"],
                    "offline": plain["tokens"] / plain["seconds"],
                }
            )
    return rounds


def report(result: dict[str, Any]) -> None:
    say("")
    if "rounds" in result:
        both = [[r["batch"], r["offline"], r["batch"] / r["offline"]] for r in result["rounds"]]
        middle = [statistics.median(column) for column in zip(*both, strict=True)]
        rows = [["tokens a second", "batch", "LLM.generate", "ratio"]]
        rows += [[f"round {n}", f"{b:.0f}", f"{o:.0f}", f"{r:.2f}"]
                 for n, (b, o, r) in enumerate(both, 1)]  # fmt: skip
        rows += [["median", f"{middle[0]:.0f}", f"{middle[1]:.0f}", f"{middle[2]:.2f}"]]
        print(table(rows), "\n")
    alone, beside = result["alone"], result["beside"]
    rows = [["a light user", "alone", "beside a batch", "ratio"]]
    for name in ("ttft_p50_ms", "ttft_p99_ms", "itl_p50_ms", "itl_p99_ms"):
        ratio = beside[name] / alone[name]
        rows.append([name, f"{alone[name]:.1f}", f"{beside[name]:.1f}", f"{ratio:.2f}"])
    print(table(rows), "\n")
    cpu = result["cpu_us"]
    print(
        f"CPU of the API process, microseconds a token: streamed {cpu['streamed']:.1f}, "
        f"batch {cpu['batch']:.1f}"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--places", type=int, default=64, help="of the engine (default 64)")
    parser.add_argument("--lines", type=int, default=600, help="of a batch (default 600)")
    parser.add_argument("--tokens", type=int, default=64, help="of an answer (default 64)")
    parser.add_argument("--rounds", type=int, default=3, help="against LLM.generate (default 3)")
    parser.add_argument("--seconds", type=float, default=40, help="of the user, each time")
    parser.add_argument(
        "--share", type=float, default=0.25, help="the setting batches.beside_users"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers here, too")
    asyncio.run(main(parser.parse_args()))
