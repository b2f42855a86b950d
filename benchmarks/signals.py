"""Which signal should drive an autoscaler? Records what one could see while the load rises.

A server gets requests at random moments (Poisson), open loop: first at a steady rate that it can
take, then at a rate that grows by the same percentage every second, to more than it can take.
Twice a second this script reads the server's metrics and its processes' CPU time. `leads.py` then
looks at the record as an autoscaler would, and says by how much each signal leads the moment at
which users no longer get their first token in time.

The runs are kept in a folder, one file each; those that are there are not made again. So a long
measurement can be done in pieces, and judged again without running anything.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import math
import re
import sys
import time
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import uvloop
from leads import draw, judge, report
from lib.bench_client import Server, offer, open_session
from lib.report import machine, say, write_json
from lib.servers import Running, heed_sigterm, start
from lib.workloads import Shape, arrivals, conversations

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

EXAMPLES = """\
examples:
  python benchmarks/signals.py --runs runs                    all workloads, twice, half an hour
  python benchmarks/signals.py --runs runs --workloads chat --seeds 1 2
  python benchmarks/signals.py --runs runs --workloads --json signals.json --plot signals.png
                                                              judge what is there, run nothing
  python benchmarks/signals.py --runs gpu --url http://127.0.0.1:8000 --places 256 \\
    --workloads chat --rates 10 60                            a server that runs, on any machine
"""
# Nothing is refused: how long the queue gets is what is looked at.
_LIMITS: Final = (
    "--set", "limits.max_requests=8192", "--set", "limits.max_queue_seconds=1000"
)  # fmt: skip
_KV_BYTES: Final = 2048
"""Of one token of the demo model: 2 layers, keys and values, 2 heads of 64, 4 bytes."""
EVERY: Final = 0.5
"""Seconds between two looks at the server."""
WORD: Final = 272
"""Answers are made of this token alone, so that all have the length asked for."""


@dataclass(frozen=True)
class Capacity:
    """What a server's engine has: `max_num_seqs`, and tokens that its KV cache takes."""

    places: int
    kv_tokens: int

    def options(self) -> tuple[str, ...]:
        """For starting it."""
        kv_bytes = self.kv_tokens * _KV_BYTES
        engine = (f"max_num_seqs={self.places}", f"kv_cache_memory_bytes={kv_bytes}")
        return (*_LIMITS, "--engine", engine[0], "--engine", engine[1])


_TIGHT: Final = Capacity(16, 12288)
_ROOMY: Final = Capacity(64, 131072)


@dataclass(frozen=True)
class Workload:
    """What is asked of which server; requests a second in the steady part and at the end."""

    shape: Shape
    steady: float
    end: float
    capacity: Capacity
    about: str


# What runs out first is another thing in each: places, KV cache, places, the engine's speed.
WORKLOADS: Final = {
    "chat": Workload(Shape(64, 192), 8, 19, _TIGHT, "short prompts, long answers"),
    "documents": Workload(Shape(1400, 96), 3.8, 9.5, _TIGHT, "long prompts, long answers"),
    "assistant": Workload(
        Shape(48, 96, system_tokens=1024),
        14,
        32,
        _TIGHT,
        "a long system prompt that all share",
    ),
    "classify": Workload(Shape(1024, 4), 19, 45, _ROOMY, "long prompts, answers of four tokens"),
}

_GAUGES: Final = {
    "waiting": "vllm:num_requests_waiting",
    "running": "vllm:num_requests_running",
    "in_flight": "synthia_requests_in_flight",
    "kv": "vllm:kv_cache_usage_perc",
}
_COUNTERS: Final = {
    "end_to_end_sum": "synthia_end_to_end_seconds_sum",
    "prefill_sum": "vllm:request_prefill_time_seconds_sum",
    "steps": "vllm:iteration_tokens_total_count",
    "queue_sum": "vllm:request_queue_time_seconds_sum",
    "queue_count": "vllm:request_queue_time_seconds_count",
    "gap_sum": "synthia_inter_token_latency_seconds_sum",
    "gap_count": "synthia_inter_token_latency_seconds_count",
    "prompt_tokens": "vllm:prompt_tokens_total",
    "cached_tokens": "vllm:prompt_tokens_cached_total",
    "answer_tokens": "vllm:generation_tokens_total",
    "preemptions": "vllm:num_preemptions_total",
}
_FIRST: Final = "synthia_time_to_first_token_seconds_bucket"
_REFUSED: Final = re.compile(r'synthia_requests_total\{.*status="(429|503)"')
_CACHE: Final = re.compile(r'vllm:cache_config_info\{.*block_size="(\d+)".*num_gpu_blocks="(\d+)"')


def look(text: str) -> dict[str, float]:
    """What is recorded of one answer of ``/metrics``."""
    named: dict[str, float] = {}
    buckets: dict[str, float] = {}
    refused = 0.0
    for line in text.splitlines():
        if line.startswith("#"):
            continue
        series, _, value = line.rpartition(" ")
        name = series.partition("{")[0]
        if name == _FIRST:
            bound = re.search(r'le="([^"]+)"', series)
            assert bound is not None
            buckets[bound[1]] = buckets.get(bound[1], 0.0) + float(value)
        elif _REFUSED.match(series):
            refused += float(value)
        else:
            named[name] = named.get(name, 0.0) + float(value)
    found = {key: named.get(name, 0.0) for key, name in (_GAUGES | _COUNTERS).items()}
    found |= {f"first_le_{bound}": count for bound, count in buckets.items()}
    return found | {"refused": refused}


async def watch(server: Server, running: Running | None, seen: list[dict[str, float]]) -> None:
    """Look at the server every `EVERY` seconds, until cancelled."""
    due = time.perf_counter()
    while True:
        at = time.perf_counter()
        cpu = running.api_cpu() + running.engine_cpu() if running else math.nan
        seen.append({"at": at, "cpu": cpu} | look(await metrics(server)))
        due += EVERY
        await asyncio.sleep(max(0.0, due - time.perf_counter()))


async def metrics(server: Server) -> str:
    """What the server says of itself."""
    async with server.session.get(f"{server.url}/metrics", raise_for_status=True) as response:
        return await response.text()


def moments_of(
    steady: float, end: float, flat: float, rising: float, seed: int
) -> tuple[list[float], float]:
    """When requests come, in seconds; and by what part the rate grows each second, after `flat`
    seconds and for `rising`."""
    growth = math.log(end / steady) / rising
    before = steady * flat
    count = round(before + (end - steady) / growth)

    def at(expected: float) -> float:
        """The moment until which so many are expected."""
        if expected <= before:
            return expected / steady
        return flat + math.log(1 + growth * (expected - before) / steady) / growth

    # A Poisson process of rate 1, in a time that runs as fast as requests are expected.
    return [at(moment) for moment in arrivals(count, 1.0, seed=seed)], growth


async def record(
    server: Server, running: Running | None, name: str, seed: int, args: argparse.Namespace
) -> dict[str, Any]:
    """One run. Raises `SystemExit` if a request failed."""
    load = WORKLOADS[name]
    steady, end = args.rates or (load.steady, load.end)
    moments, growth = moments_of(steady, end, args.steady_seconds, args.rising_seconds, seed)
    cache = _CACHE.search(await metrics(server))
    seen: list[dict[str, float]] = []
    asked = conversations(load.shape, len(moments), seed)
    watching = asyncio.create_task(watch(server, running, seen))
    try:
        run = await offer(server, asked, moments=moments)
    finally:
        watching.cancel()
    failed = [answer.error for answer in run.answers if answer.outcome == "failed"]
    if failed:
        raise SystemExit(f"{len(failed)} requests failed, the first with: {failed[0]}")
    over = args.steady_seconds + args.rising_seconds
    seen = [row for row in seen if 0 <= row["at"] - run.begun <= over]
    answered = [answer.output for answer in run.answers if answer.outcome == "answered"]
    return machine() | {
        "workload": name,
        "about": load.about,
        "seed": seed,
        "places": args.places or load.capacity.places,
        "kv_tokens": int(cache[1]) * int(cache[2]) if cache else None,
        "cores": len(running.process.cpu_affinity()) if running else None,
        "steady_rate": steady,
        "steady_seconds": args.steady_seconds,
        "growth": growth,
        "refused": run.counts["refused"],
        "sent_late_max": max(answer.late for answer in run.answers),
        "client_cpu_share": run.client_cpu / run.seconds,
        "seen": {
            key: [_short(row[key] - (run.begun if key == "at" else 0)) for row in seen]
            for key in seen[0]
        },
        # Sent, first token and end in seconds; tokens of the prompt and of the answer.
        "requests": [
            [_short(o.start_time - run.begun), _short(o.ttft), _short(o.latency), o.prompt_len,
             o.output_tokens]
            for o in answered
        ],
    }  # fmt: skip


def _short(value: float) -> float:
    return round(value, 4)


async def measure(todo: Sequence[tuple[str, int]], args: argparse.Namespace) -> None:
    """Make the runs `todo`, each on a server of its own."""
    say("loading the code of `vllm bench serve`")
    logging.getLogger("vllm").setLevel(logging.ERROR)  # a client needs no advice on GPUs
    import vllm.benchmarks.serve  # noqa: F401 - now, and not during the run

    for number, (name, seed) in enumerate(todo, 1):
        print(f"run {number} of {len(todo)}: {name}, seed {seed}", file=sys.stderr, flush=True)
        async with AsyncExitStack() as stack:
            running = None
            if not args.url:
                options = WORKLOADS[name].capacity.options()
                running = await stack.enter_async_context(start("synthia", *options))
            session = await stack.enter_async_context(open_session(600))
            url = running.url if running else args.url
            async with session.get(f"{url}/v1/models", raise_for_status=True) as response:
                model = (await response.json())["data"][0]["id"]
            body: Mapping[str, Any] = {"ignore_eos": True, "logit_bias": {str(WORD): 100}}
            server = Server(session, url, model, body)
            await offer(server, conversations(Shape(64, 16), 32, 0), concurrency=8)  # to warm up
            found = await record(server, running, name, seed, args)
        _file(args.runs, name, seed).write_text(json.dumps(found) + "\n")


def _file(folder: Path, name: str, seed: int) -> Path:
    return folder / f"{name}-{seed}.json"


async def main(args: argparse.Namespace) -> None:
    heed_sigterm()
    args.runs.mkdir(parents=True, exist_ok=True)
    wanted = [(name, seed) for seed in args.seeds for name in args.workloads]
    todo = [(name, seed) for name, seed in wanted if not _file(args.runs, name, seed).exists()]
    if todo:
        await measure(todo, args)
    runs = [json.loads(file.read_text()) for file in sorted(args.runs.glob("*.json"))]
    if not runs:
        raise SystemExit(f"There is no run in {args.runs}.")
    found = judge(runs)
    print(report(found))
    if args.json:
        write_json(args.json, found)
    if args.plot:
        draw(runs, found, args.plot)


def parse() -> argparse.Namespace:
    """The command line, checked."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--runs", type=Path, required=True, metavar="FOLDER", help="where the runs are kept")
    add("--workloads", nargs="*", choices=WORKLOADS, default=list(WORKLOADS), metavar="NAME",
        help="; ".join(f"{name}: {load.about}" for name, load in WORKLOADS.items()))  # fmt: skip
    add("--seeds", type=int, nargs="+", default=[1, 2], help="a run for each (default 1 2)")
    add("--steady-seconds", type=float, default=60, help="at a rate that is fine (default 60)")
    add("--rising-seconds", type=float, default=100, help="of a growing rate (default 100)")
    add = parser.add_argument_group("a server that runs").add_argument
    add("--url", help="as http://127.0.0.1:8000; its key in OPENAI_API_KEY. No CPU is recorded")
    add("--places", type=int, help="its engine's max_num_seqs")
    add("--rates", type=float, nargs=2, metavar=("STEADY", "END"),
        help="requests a second instead of the demo model's on two cores: one that is fine, and "
        "one that is clearly too much")  # fmt: skip
    add = parser.add_argument_group("what is told").add_argument
    add("--json", type=Path, metavar="FILE", help="write the numbers here, too")
    add("--plot", type=Path, metavar="FILE", help="draw them into this PNG")
    args = parser.parse_args()
    if bool(args.url) != bool(args.places):
        parser.error("--url and --places belong together")
    if args.url:
        args.url = args.url.rstrip("/").removesuffix("/v1")
    return args


if __name__ == "__main__":
    uvloop.run(main(parse()))
