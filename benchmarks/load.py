"""Puts a load of many kinds on any OpenAI-compatible chat server, and says how it was answered.

Requests come
- in a closed loop (`--concurrency`): so many at the same time, the next when one is over;
- in an open loop (`--rate`): at random moments, however long answers take, see `--burstiness`;
- at a growing or falling rate (`--ramp`), or at the moments of a file (`--trace`);
- in runs at one rate after the other (`--sweep`), to find the highest that meets the objectives.

They are sent and measured by the code of `vllm bench serve`, so that numbers compare with those
published of it; `score.py` has the definitions, `workloads.py` says what is asked. The server is
one that runs already (`--url`; its key is read from the environment variable OPENAI_API_KEY), or
one started here on the demo model. What comes after ``--`` are options for starting it.

This server always ends an answer at ``USER:``, and a small model soon says that. For answers that
all have the length asked for, use `--exact-length`: it asks for `ignore_eos`, and by `logit_bias`
for nothing but one token.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import math
import os
import sys
from contextlib import AsyncExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Final

import aiohttp
import uvloop
from lib.bench_client import Server, offer, open_session
from lib.report import machine, say, write_json
from lib.score import MEASURES, report, report_steps, summary
from lib.servers import available, heed_sigterm, start
from lib.workloads import SHAPES, Shape, arrivals, conversations, read_trace

EXAMPLES = """\
examples:
  python benchmarks/load.py                                   16 at a time on the demo model
  python benchmarks/load.py --url http://127.0.0.1:8000 --rate 4 --workload sharegpt
  python benchmarks/load.py --rate 8 --burstiness 0.5 --goodput ttft:500 itl:50
  python benchmarks/load.py --ramp 1 20 --workload multiturn --json ramp.json --plot ramp.png
  python benchmarks/load.py --trace trace.jsonl --trace-unit 0.001 --exact-length
  python benchmarks/load.py --sweep --goodput ttft:500 itl:50 --exact-length --plot sweep.png
  python benchmarks/load.py --start vllm-python               the same on `vllm serve`
  python benchmarks/load.py --concurrency 64 -- --engine max_num_seqs=32
"""
# Token 272 is " the" to Mistral's tokenizer.
WORD: Final = 272
PRECISION: Final = 0.1
"""A sweep ends when the lowest rate that failed is at most this much above the highest that met."""


def next_rate(met: float, missed: float) -> float | None:
    """What a sweep tries between the highest rate that met the objectives and the lowest that did
    not (0 and infinity: none yet); nothing more once they are close."""
    if math.isinf(missed):
        return 2 * met
    if met == 0:
        return missed / 2
    return math.sqrt(met * missed) if missed > (1 + PRECISION) * met else None


async def sweep(
    server: Server, shape: Shape, args: argparse.Namespace
) -> tuple[float, list[dict[str, Any]]]:
    """Run at one rate after the other, telling of each; the highest that met, and all runs."""
    steps: list[dict[str, Any]] = []
    met, missed = 0.0, math.inf
    rate: float | None = args.sweep
    while rate is not None and rate > args.sweep / 1000:
        count = max(10, round(rate * args.step_seconds))
        seed = args.seed + len(steps) + 1  # no prompt of the last step is in the prefix cache
        moments = arrivals(count, rate, args.burstiness, seed)
        run = await offer(server, conversations(shape, count, seed), moments=moments)
        found = summary(run, args.goodput)
        is_met = found["good_share"] >= args.attainment
        met, missed = (rate, missed) if is_met else (met, rate)
        steps.append({"request_rate": rate, "met": is_met} | found)
        print(
            f"{rate:.3g} requests/s: {100 * found['good_share']:.1f} % good, TTFT p99 "
            f"{found['p99_ttft_ms']:.0f} ms, ITL p99 {found['p99_itl_ms']:.0f} ms: "
            f"{'met' if is_met else 'missed'}",
            flush=True,
        )
        rate = next_rate(met, missed)
    return met, steps


async def reach(session: aiohttp.ClientSession, url: str, args: argparse.Namespace) -> Server:
    """The server at `url`, once it has answered `--warmup` requests. Raises `SystemExit`."""
    body = dict(args.extra_body)
    if args.exact_length is not None:
        body |= {"ignore_eos": True, "logit_bias": {str(args.exact_length): 100}}
    model = args.model
    if model is None:
        try:
            async with session.get(f"{url}/v1/models", raise_for_status=True) as response:
                model = (await response.json())["data"][0]["id"]
        except (aiohttp.ClientError, ValueError, LookupError, TypeError) as error:
            raise SystemExit(f"{url}/v1/models does not say what is served: {error}") from None
    server = Server(session, url, model, body)
    asked = conversations(replace(SHAPES["fixed"], output_tokens=16), args.warmup, args.seed - 1)
    for answer in (await offer(server, asked, concurrency=4)).answers:
        if answer.outcome != "answered":
            raise SystemExit(f"A warm-up request got {answer.error}\n{answer.refusal}")
    return server


async def main(args: argparse.Namespace) -> int:
    heed_sigterm()
    say("loading the code of `vllm bench serve`")
    logging.getLogger("vllm").setLevel(logging.ERROR)  # a client needs no advice on GPUs
    import vllm.benchmarks.serve  # noqa: F401 - now, and not during the run

    shape = replace(SHAPES[args.workload], **args.lengths)
    moments: list[float] = []
    if args.trace:
        moments, asked = read_trace(args.trace, shape, args.seed, args.trace_unit)
    else:
        asked = conversations(shape, args.requests, args.seed)
    if args.rate or args.ramp:
        rate, ramp_to = args.ramp or (args.rate, None)
        moments = arrivals(len(asked), rate, args.burstiness, args.seed, ramp_to=ramp_to)
    gc.freeze()  # what was imported is not looked through while times are taken
    async with AsyncExitStack() as stack:
        url = args.url
        if url is None:
            url = (await stack.enter_async_context(start(args.start, *args.options))).url
        session = await stack.enter_async_context(open_session(args.timeout))
        server = await reach(session, url, args)
        document = machine() | {
            "backend": "openai-chat",
            "model_id": server.model,
            "request_rate": args.rate or (None if moments or args.sweep else "inf"),
            "max_concurrency": None if moments or args.sweep else args.concurrency,
            "burstiness": args.burstiness,
            "ramp": args.ramp,
            "trace": args.trace and str(args.trace),
            "shape": asdict(shape),
            "objectives_ms": args.goodput,
            "seed": args.seed,
        }
        if args.sweep:
            met, steps = await sweep(server, shape, args)
            document |= {"highest_rate": met, "steps": steps}
            text = f"\n{report_steps(steps)}\n\nThe highest rate that met all: {met:.3g} requests/s"
        else:
            run = await offer(server, asked, concurrency=args.concurrency, moments=moments)
            document |= summary(run, args.goodput)
            text = report(document)
    gc.unfreeze()
    print(text)
    if args.json:
        write_json(args.json, document)
    if args.markdown:
        args.markdown.write_text(text + "\n")
    if args.plot:
        from lib import plots

        if args.sweep:
            plots.draw_sweep(steps, args.goodput, args.plot)
        else:
            plots.draw_run([answer.output for answer in run.answers], args.plot)
    return 0


def goal(pair: str) -> tuple[str, float]:
    """``ttft:500`` as the name of a measure and its limit in ms."""
    measure, _, limit = pair.partition(":")
    if measure not in MEASURES:
        raise argparse.ArgumentTypeError(f"{pair!r}: it is one of {', '.join(MEASURES)}")
    return measure, float(limit)


def parse() -> argparse.Namespace:
    """The command line, checked."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument_group("the server").add_argument
    add("--url", help="of a server that runs, as http://127.0.0.1:8000")
    add("--api-key", help="better in OPENAI_API_KEY: others here can read a command line")
    add("--model", help="by default the first that the server names")
    add("--start", choices=available(), default="synthia", help="the one to start without --url")
    add("options", nargs="*", metavar="-- OPTIONS", help="for starting it")
    group = parser.add_argument_group("arrivals").add_mutually_exclusive_group()
    add = group.add_argument
    add("--concurrency", type=int, default=16, metavar="N", help="at the same time (default 16)")
    add("--rate", type=float, help="a second, at random moments")
    add("--ramp", type=float, nargs=2, metavar=("FROM", "TO"), help="rates, over all requests")
    add("--trace", type=Path, metavar="FILE",
        help="JSON lines with timestamp, input_length, output_length")  # fmt: skip
    add("--sweep", type=float, nargs="?", const=1.0, metavar="RATE",
        help="the highest rate that meets --goodput; it tries RATE first (default 1)")  # fmt: skip
    add = parser.add_argument
    add("--burstiness", type=float, default=1.0,
        help="shape of the gamma distribution of gaps: 1 is Poisson, less is burstier")  # fmt: skip
    add("--trace-unit", type=float, default=1.0, metavar="SECONDS", help="of its timestamps")
    add("--step-seconds", type=float, default=20, help="of arrivals at each rate of a sweep")
    add("--attainment", type=float, default=0.99,
        help="share of requests that a sweep wants to be good (default 0.99)")  # fmt: skip
    add = parser.add_argument_group("what is asked").add_argument
    add("--workload", choices=SHAPES, default="fixed", help="lengths; the next four change them")
    for name in ("input_tokens", "output_tokens", "turns", "system_tokens"):
        add(f"--{name.replace('_', '-')}", type=int, metavar="N")
    add("--requests", type=int, default=200, metavar="N",
        help="conversations, which have one turn but for multiturn (default 200)")  # fmt: skip
    add("--exact-length", type=int, nargs="?", const=WORD, metavar="TOKEN",
        help=f"answers that go on to the end, made of this one (default {WORD})")  # fmt: skip
    add("--extra-body", type=json.loads, default={}, metavar="JSON", help="more for each request")
    add("--seed", type=int, default=0)
    add = parser.add_argument_group("what is told").add_argument
    add("--goodput", type=goal, nargs="+", default=[], metavar="MEASURE:MS",
        help="objectives; itl is for 99 %% of the gaps of an answer")  # fmt: skip
    add("--json", type=Path, metavar="FILE", help="write the numbers here, too")
    add("--markdown", type=Path, metavar="FILE", help="write what is printed here, too")
    add("--plot", type=Path, metavar="FILE", help="draw them into this PNG")
    add = parser.add_argument
    add("--warmup", type=int, default=8, help="requests before, which do not count (default 8)")
    add("--timeout", type=float, default=600, help="seconds for an answer (default 600)")
    args = parser.parse_args()
    args.goodput = dict(args.goodput)
    if args.sweep and not args.goodput:
        parser.error("--sweep needs --goodput")
    args.lengths = {
        name: value
        for name in ("input_tokens", "output_tokens", "turns", "system_tokens")
        if (value := getattr(args, name)) is not None
    }
    if args.url:
        args.url = args.url.rstrip("/").removesuffix("/v1")
    if args.api_key:
        os.environ["OPENAI_API_KEY"] = args.api_key
        sys.argv = [word.replace(args.api_key, "...") for word in sys.argv]  # it is in the JSON
    return args


if __name__ == "__main__":
    sys.exit(uvloop.run(main(parse())))
