"""Everything at once for a while, then the books: is anything lost, left over, or grown?

Well-behaved users stream and read plain answers, others leave at every stage, trickle, stop
reading, send what is made to break a server, the worst grammars among it, run into limits and
deadlines, speak HTTP as old clients and proxies do, while the key file changes. Each check prints
PASS or FAIL; the exit code is 1 if anything fell short.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import http.client
import itertools
import json
import multiprocessing
import random
import socket
import struct
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grammars
import psutil
from lib.client import Target, environment, serve
from lib.report import say, table

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

EXAMPLES = """\
examples:
  python benchmarks/soak.py --minutes 2
  python benchmarks/soak.py --minutes 30 --json soak.json
"""
USERS: dict[str, dict[str, Any]] = {
    "good": {"weight": 2},
    "steady": {},
    "leaver": {"weight": 0.5},
    "hostile": {"weight": 0.5},
    "limited": {"requests_per_minute": 60, "tokens_per_minute": 6000, "concurrent_requests": 2},
    "late": {},
}
WELL_BEHAVED = ("good", "steady")
QUESTION = "What is the difference between an Orca, Dolphin and a Seal?"
GREEDY = {
    "model": "synthia-demo",
    "messages": [{"role": "user", "content": QUESTION}],
    "temperature": 0,
    "max_tokens": 120,
}
STREAM = {"stream": True, "stream_options": {"include_usage": True}}
VARIANTS: tuple[dict[str, Any], ...] = (
    {"n": 3, "temperature": 0.75},
    {"logprobs": True, "top_logprobs": 5},
    {"stop": ["whale", "the"]},
    {"messages": [{"role": "user", "content": "orca " * 400}], "max_tokens": 8},
    {"messages": [{"role": "user", "content": "Hello!"}, {"role": "assistant", "content": "Hi."},
                  {"role": "user", "content": QUESTION}]},
    {"response_format": {"type": "json_object"}, "max_tokens": 20},
    {"structured_outputs": {"choice": ["yes", "USER: no"]}},
    {"n": 2, "stop": "\n", "chat_id": "unknown to the server", "skip_special_tokens": True},
    {"min_tokens": 30, "ignore_eos": True},
)  # fmt: skip
HOSTILE: tuple[bytes, ...] = (
    b"{", b"[" * 500_000, b'{"temperature":NaN}', b"\xef\xbb\xbf{}", b"\xff" * 1000,
    b'{"model":"synthia-demo","messages":[{"role":"user","content":"\\ud800"}]}',
    b"{" + b",".join(b'"k%d":1' % i for i in range(45_000)) + b"}",
    b'{"model":"x","messages":[' + b",".join([b"{}"] * 170_000) + b"]}",
    b'{"model":"x","messages":[{"role":"user","content":"x"}],"stop":['
    + b",".join([b'"a"'] * 125_000) + b"]}",
    b'{"model":"x","messages":[{"role":"user","content":"x"}],"logit_bias":{'
    + b",".join(b'"%d":1' % i for i in range(48_000)) + b"}}",
    b'{"model":"synthia-demo","messages":[{"role":"user","content":"' + b"USER: a\\n" * 52_000
    + b'"}]}',
    b'{"model":"synthia-demo","messages":[{"role":"user","content":"x"}],"max_tokens":4,'
    b'"response_format":{"type":"json_schema","json_schema":{"name":"x","schema":'
    b'{"type":"string","pattern":"^(a{1,1000}){1,1000}$"}}}}',
    b" " * (1 << 20),
    *(json.dumps(body | {"max_tokens": 40}).encode()
      for body in itertools.islice(grammars.hostile(), 24)),
)  # fmt: skip


@dataclass
class Books:
    """What was sent, and what came back."""

    came_back: Counter[str] = field(default_factory=Counter)
    told: Counter[str] = field(default_factory=Counter)
    """Tokens told in `usage`, by user."""
    wrong: list[str] = field(default_factory=list)
    quiet: list[float] = field(default_factory=list)
    loud: list[float] = field(default_factory=list)
    hostile: list[tuple[float, float]] = field(default_factory=list)
    """When hostile input was under way."""


async def honest(target: Target, user: str, books: Books, until: float, reference: str) -> None:
    """Ask, read to the end, compare."""
    draw = random.Random(f"{user}{id(books)}")
    while time.monotonic() < until:
        streamed, variant = draw.random() < 0.6, draw.choice(({}, {}, *VARIANTS))
        outcome = await target.chat(GREEDY | variant | (STREAM if streamed else {}), user)
        kind = f"{user} {'streamed' if streamed else 'plain'}"
        books.came_back[f"{kind}: {outcome.status} {outcome.code or ''}"] += 1
        books.told[user] += outcome.prompt_tokens + outcome.answer_tokens
        if outcome.status == 200 and not outcome.whole:
            books.wrong.append(f"{kind} {variant}: not whole ({outcome.code})")
        elif outcome.status == 200 and not variant and outcome.text != reference:
            books.wrong.append(f"{kind}: another answer: {outcome.text[:80]!r}")
        elif outcome.status != 200:
            books.wrong.append(f"{kind} {variant}: {outcome.status} {outcome.code}")


async def limited(target: Target, user: str, books: Books, until: float) -> None:
    """Run into the limits; only the errors for that may come."""
    more = {"X-Request-Timeout": "0.05"} if user == "late" else {}
    while time.monotonic() < until:
        outcome = await target.chat(GREEDY | STREAM, user, more)
        books.came_back[f"{user}: {outcome.status} {outcome.code or ''}"] += 1
        allowed = (200, 504) if user == "late" else (200, 429)
        if outcome.status not in allowed or (outcome.status == 429 and not outcome.retry_after):
            books.wrong.append(f"{user}: {outcome.status} {outcome.code}")
        await asyncio.sleep(0.05)


def request_bytes(target: Target, user: str, body: bytes, length: int | None = None) -> bytes:
    key = target.keys[user].encode()
    return (
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        b"Authorization: Bearer %b\r\nContent-Length: %d\r\n\r\n%b"
        % (key, len(body) if length is None else length, body)
    )


async def leavers(target: Target, books: Books, until: float) -> None:
    """Leave by FIN or RST, in the queue, in prefill, in decode; trickle; stop reading."""
    draw = random.Random("leaver")
    port = int(target.url.rsplit(":", 1)[1])
    while time.monotonic() < until:
        more = {"stream": draw.random() < 0.5, "n": draw.choice((1, 1, 3)), "temperature": 1}
        body = json.dumps(GREEDY | more).encode()
        with contextlib.suppress(ConnectionError):
            reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1024)
            way = draw.choice(("fin", "rst", "half", "trickle", "stall"))
            if way == "trickle":
                writer.write(request_bytes(target, "leaver", b'{"mod', 500))
            else:
                writer.write(request_bytes(target, "leaver", body))
            await writer.drain()
            if way == "half":
                writer.write_eof()
            if way == "stall":
                await asyncio.sleep(1)
            elif draw.random() < 0.5:
                await asyncio.sleep(draw.random() * 0.3)
            else:
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(reader.read(draw.randint(1, 2000)), 0.5)
            if way == "rst":
                held: socket.socket = writer.get_extra_info("socket")
                held.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            writer.close()
            books.came_back[f"left: {way}"] += 1


async def old_fashioned(target: Target, books: Books, until: float, reference: str) -> None:
    """A stream in HTTP/1.0, HEAD, OPTIONS of a probe, a slash at the end: nobody is turned away."""
    port = int(target.url.rsplit(":", 1)[1])
    body = json.dumps(GREEDY | {"stream": True}).encode()
    asked = request_bytes(target, "steady", body).replace(b"HTTP/1.1", b"HTTP/1.0", 1)
    while time.monotonic() < until:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(asked)
        head, _, said = (await reader.read()).partition(b"\r\n\r\n")
        writer.close()
        events = [line[6:] for line in said.split(b"\n\n") if line.startswith(b"data: {")]
        deltas = [json.loads(event)["choices"][0]["delta"] for event in events]
        text = "".join(delta.get("content", "") for delta in deltas)
        books.came_back[f"HTTP/1.0: {head[9:12].decode()}"] += 1
        if text != reference or b"chunked" in head.lower():
            books.wrong.append(f"HTTP/1.0: {head[:60]!r} {text[:60]!r}")
        for method, path in (("HEAD", "/health"), ("OPTIONS", "/ready"), ("HEAD", "/v1/models/")):
            async with target.session.request(
                method, f"{target.url}{path}", headers=target.headers("steady")
            ) as response:
                books.came_back[f"{method} {path}: {response.status}"] += 1
                if response.status != 200:
                    books.wrong.append(f"{method} {path}: {response.status}")
        await asyncio.sleep(0.5)


async def hostile(target: Target, books: Books, until: float) -> None:
    """What is made to break a server, in turn with pauses, so that a stall can be told apart."""
    headers = target.headers("hostile", {"Content-Type": "application/json"})
    while time.monotonic() < until:
        begun = time.monotonic()
        for content in HOSTILE:
            try:
                async with target.session.post(
                    f"{target.url}/v1/chat/completions", data=content, headers=headers
                ) as response:
                    await response.read()
                    books.came_back[f"hostile: {response.status}"] += 1
                    if response.status >= 500:
                        books.wrong.append(f"hostile {content[:60]!r}: {response.status}")
            except OSError as error:
                books.came_back[f"hostile: {type(error).__name__}"] += 1
        async with target.session.get(f"{target.url}/v1/models") as response:  # without a key
            books.came_back[f"no key: {response.status}"] += 1
            if response.status != 401:
                books.wrong.append(f"no key: {response.status}")
        books.hostile.append((begun, time.monotonic()))
        await asyncio.sleep(2)


def watch_ready(port: int, until: float, waits: Connection) -> None:
    """Ask `/ready` again and again, in a process of its own: what holds the server's event loop up
    holds this answer up, and nothing that this script does.

    Sends when each was asked (seconds of the monotonic clock) and how long it took.
    """
    found = []
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    while (begun := time.monotonic()) < until:
        connection.request("GET", "/ready")
        connection.getresponse().read()
        found.append((begun, time.monotonic() - begun))
        time.sleep(0.01)
    waits.send(found)


async def canary(target: Target, books: Books, until: float) -> None:
    """Sort what `watch_ready` found by whether hostile input was under way."""
    ours, its = multiprocessing.Pipe(duplex=False)
    port = int(target.url.rsplit(":", 1)[1])
    watcher = multiprocessing.get_context("spawn").Process(
        target=watch_ready, args=(port, until, its), daemon=True
    )
    watcher.start()
    its.close()
    for begun, took in await asyncio.to_thread(ours.recv):
        loud = any(begun <= end and begin <= begun + took for begin, end in books.hostile)
        (books.loud if loud else books.quiet).append(took)
    await asyncio.to_thread(watcher.join)


async def change_keys(file: Path, until: float) -> None:
    """Touch the key file now and then: it is read again, and nobody notices."""
    while time.monotonic() < until:
        await asyncio.sleep(5)
        file.write_text(file.read_text())


@dataclass
class Size:
    """What a server holds of the machine."""

    edge_mb: float
    engine_mb: float
    files: int
    threads: int


def size(target: Target) -> Size:
    process = psutil.Process(target.process.pid)
    below = process.children(recursive=True)
    return Size(
        process.memory_info().rss / 1e6,
        sum(child.memory_info().rss for child in below) / 1e6,
        process.num_fds(),
        process.num_threads(),
    )


async def load(target: Target, books: Books, seconds: float, reference: str, file: Path) -> None:
    until = time.monotonic() + seconds
    jobs = [honest(target, user, books, until, reference) for user in WELL_BEHAVED * 4]
    jobs += [limited(target, user, books, until) for user in ("limited", "late") * 2]
    jobs += [leavers(target, books, until) for _ in range(3)]
    jobs += [old_fashioned(target, books, until, reference)]
    jobs += [hostile(target, books, until), canary(target, books, until), change_keys(file, until)]
    running = [asyncio.create_task(job) for job in jobs]
    while not all(job.done() for job in running):
        say(f"{max(0, until - time.monotonic()):.0f} s left, {books.came_back.total()} came back")
        await asyncio.sleep(1)
    await asyncio.gather(*running)


async def settled(target: Target) -> dict[str, float]:
    """The metrics once all is quiet; vLLM sets its gauges with each step, so one more is made."""
    await asyncio.sleep(3)
    await target.chat(GREEDY | {"max_tokens": 2}, "late")
    await asyncio.sleep(2)
    return await target.metrics()


async def main(args: argparse.Namespace) -> int:
    options = (
        "--engine", "max_num_seqs=16", "--set", "limits.max_queue_seconds=300",
        "--set", "limits.stalled_seconds=5", "--set", "limits.receive_seconds=5",
    )  # fmt: skip
    async with serve(*options, users=USERS) as target:
        reference = (await target.chat(GREEDY, "late")).text
        file = target.log.with_name("keys.yaml")
        warm_up = Books()
        await load(target, warm_up, min(30, 15 * args.minutes), reference, file)
        started = await settled(target)
        before = size(target)
        books = Books()
        await load(target, books, 60 * args.minutes, reference, file)
        found = await settled(target)
        after = size(target)
        say("")

        def total(name: str, where: dict[str, float]) -> float:
            return sum(v for key, v in where.items() if key.split("{")[0] == name)

        def counted(user: str) -> float:
            names = [
                f'synthia_user_tokens_total{{kind="{kind}",user="{user}"}}'
                for kind in ("prompt", "answer")
            ]
            return sum(found.get(name, 0) - started.get(name, 0) for name in names)

        def gone(name: str, having: str = "") -> float:
            return sum(
                value - started.get(key, 0)
                for key, value in found.items()
                if key.split("{")[0] == name and having in key
            )

        def agree(kind: str, *counts: float) -> tuple[str, object, bool]:
            shown = " ".join(f"{count:.0f}" for count in counts)
            return f"tokens of {kind}", shown, len(set(counts)) == 1

        # The two cores are full, so there are stalls without hostile input too.
        stall = max(books.loud, default=0) - max(books.quiet, default=0)
        checks: list[tuple[str, object, bool]] = [
            ("answers wrong, lost or refused without reason", len(books.wrong), not books.wrong),
            ("requests in flight at the edge", found["synthia_requests_in_flight"],
             found["synthia_requests_in_flight"] == 0),
            ("requests running in the engine", total("vllm:num_requests_running", found),
             total("vllm:num_requests_running", found) == 0),
            ("requests waiting in the engine", total("vllm:num_requests_waiting", found),
             total("vllm:num_requests_waiting", found) == 0),
            ("KV cache in use", total("vllm:kv_cache_usage_perc", found),
             total("vllm:kv_cache_usage_perc", found) == 0),
            ("tokens of good: told - counted", books.told["good"] - counted("good"),
             books.told["good"] == counted("good")),
            agree("answers: by users, by models, in vLLM",
                  gone("synthia_user_tokens_total", 'kind="answer"'),
                  gone("synthia_answer_tokens_total"), gone("vllm:generation_tokens_total")),
            agree("prompts: by users, by models",
                  gone("synthia_user_tokens_total", 'kind="prompt"'),
                  gone("synthia_prompt_tokens_total")),
            ("open files, before and after", f"{before.files} {after.files}",
             after.files <= before.files + 3),
            ("threads, before and after", f"{before.threads} {after.threads}",
             after.threads <= before.threads + 2),
            ("MB of the edge, before and after", f"{before.edge_mb:.0f} {after.edge_mb:.0f}",
             after.edge_mb <= 1.1 * before.edge_mb + 50),
            ("MB of the engine, before and after", f"{before.engine_mb:.0f} {after.engine_mb:.0f}",
             after.engine_mb <= 1.1 * before.engine_mb + 50),
            ("longest stall, without and with hostile input, ms",
             f"{1e3 * max(books.quiet, default=0):.0f} {1e3 * max(books.loud, default=0):.0f}",
             stall <= 0.25),
        ]  # fmt: skip
        print(table([["came back", "times"], *sorted(books.came_back.items())]), "\n")
        for wrong in books.wrong[:10]:
            print("  ", wrong)
        rows = [[name, value, "PASS" if ok else "FAIL"] for name, value, ok in checks]
        print(table([["check", "found", ""], *rows]))
        if args.json:
            args.json.write_text(
                json.dumps(
                    {
                        "environment": await environment(target),
                        "minutes": args.minutes,
                        "came_back": books.came_back,
                        "checks": {name: {"found": v, "ok": ok} for name, v, ok in checks},
                        "wrong": books.wrong[:100],
                    },
                    indent=1,
                )
                + "\n"
            )
        return 0 if all(ok for _, _, ok in checks) else 1


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=10, help="of load, after a warm-up")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers here, too")
    sys.exit(asyncio.run(main(parser.parse_args())))
