"""What the serving layer costs: CPU time of the API process alone, per token and per request.

The same requests go to this server and to both frontends of `vllm serve`, in turn, several times
over. CPU time is read from each process's own clock, so that the client, the engine and the noise
of the machine are accounted apart; only ratios within one run mean much.

- stream, plain: CPU per answer token of answers of one length, all requests at once;
- request: CPU of a request for one token, streamed; the number of connections stays the same.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import statistics
import sys
import time
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final, cast
from urllib.parse import urlsplit

import uvloop
from harness import machine, percentile, say, spread, table
from targets import MODEL, Running, available, start

EXAMPLES = """\
examples:
  python benchmarks/edge.py                        every target that can be started here
  python benchmarks/edge.py --targets synthia vllm-python --rounds 5 --json edge.json
  VLLM_RUST_FRONTEND_PATH=/path/to/vllm-rs python benchmarks/edge.py
"""
# Token 272 is " the": an answer made of nothing else is as long as it is asked to be, on every
# server, for the marker of the next turn never comes.
WORD: Final = "272"
TOKENS: Final = re.compile(rb'"completion_tokens": ?(\d+)')


@dataclass
class Load:
    """`requests` requests over `connections` connections, each for `tokens` tokens."""

    kind: str
    connections: int
    requests: int
    tokens: int
    streamed: bool

    def body(self, number: int) -> bytes:
        asked: dict[str, Any] = {
            "model": MODEL,
            "messages": [{"role": "user", "content": f"{number}: what is a seal?"}],
            "max_tokens": self.tokens,
            "temperature": 0,
            "ignore_eos": True,
            "logit_bias": {WORD: 100},
            "stop": ["USER:"],
        }
        if self.streamed:
            asked |= {"stream": True, "stream_options": {"include_usage": True}}
        return json.dumps(asked).encode()


@dataclass
class Found:
    """What one load brought."""

    answered: int = 0
    tokens: int = 0
    gaps: list[float] = field(default_factory=list)
    seconds: float = 0.0
    api_cpu: float = 0.0
    engine_cpu: float = 0.0
    client_cpu: float = 0.0


class Client(asyncio.Protocol):
    """Sends requests one after the other on one connection, and looks no closer than it must."""

    def __init__(self, bodies: list[bytes], found: Found, done: asyncio.Future[None]) -> None:
        self._bodies, self._found, self._done = bodies, found, done
        self._tail = b""
        self._last = 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        self._next()

    def _next(self) -> None:
        if not self._bodies:
            self._transport.close()
            if not self._done.done():
                self._done.set_result(None)
            return
        body = self._bodies.pop()
        self._tail, self._last = b"", 0.0
        self._transport.write(
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: bench\r\n"
            b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)
        )

    def data_received(self, data: bytes) -> None:
        found = self._found
        events = data.count(b'"content":')
        if events:
            now = time.perf_counter()
            if self._last:
                found.gaps.append(now - self._last)
                found.gaps += [0.0] * (events - 1)
            self._last = now
        tail = self._tail = (self._tail + data)[-4096:]
        if b"[DONE]" in tail[-64:] or tail.endswith(b"}"):
            counted = TOKENS.findall(tail)
            if tail.endswith((b"0\r\n\r\n", b"}")) and counted:
                found.answered += 1
                found.tokens += int(counted[-1])
                self._next()

    def connection_lost(self, exc: Exception | None) -> None:
        if not self._done.done():
            self._done.set_exception(exc or ConnectionError(self._tail[-500:].decode()))


async def offer(target: Running, load: Load, offset: int) -> Found:
    """Put `load` on `target`; prompts are numbered from `offset`, so that none comes twice."""
    found = Found()
    loop = asyncio.get_running_loop()
    numbers = iter(range(offset, offset + load.requests))
    each = load.requests // load.connections
    host, port = urlsplit(target.url).hostname, urlsplit(target.url).port
    waiting = []
    api, engine, client = target.api_cpu(), target.engine_cpu(), time.process_time()
    begun = time.perf_counter()
    for _ in range(load.connections):
        done: asyncio.Future[None] = loop.create_future()
        bodies = [load.body(next(numbers)) for _ in range(each)]
        await loop.create_connection(
            lambda bodies=bodies, done=done: Client(bodies, found, done),  # type: ignore[misc]
            host,
            port,
        )
        waiting.append(done)
    await asyncio.wait_for(asyncio.gather(*waiting), 600)
    found.seconds = time.perf_counter() - begun
    await asyncio.sleep(0.2)  # what the server does after the last byte counts, too
    found.api_cpu = target.api_cpu() - api
    found.engine_cpu = target.engine_cpu() - engine
    found.client_cpu = time.process_time() - client
    if found.answered != load.requests:
        raise SystemExit(f"{target.name}: {found.answered} of {load.requests} requests answered")
    return found


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
        args.json.write_text(json.dumps(document, indent=1) + "\n")
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
