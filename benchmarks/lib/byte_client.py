"""A client that looks at bytes only as closely as it must, for measuring what a server costs."""

from __future__ import annotations

import asyncio
import json
import re
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, cast
from urllib.parse import urlsplit

from lib.servers import MODEL

if TYPE_CHECKING:
    from lib.servers import Running

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
    word: bool = True
    """Answers are made of one word; else of whatever the model says, with no end to it."""

    def conversation(self, number: int) -> list[dict[str, str]]:
        """What request `number` asks."""
        return [{"role": "user", "content": f"{number}: what is a seal?"}]

    def body(self, number: int) -> bytes:
        asked: dict[str, Any] = {
            "model": MODEL,
            "messages": self.conversation(number),
            "max_tokens": self.tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stop": ["USER:"],
        }
        if self.word:
            asked["logit_bias"] = {WORD: 100}
        if self.streamed:
            asked |= {"stream": True, "stream_options": {"include_usage": True}}
        return json.dumps(asked).encode()


@dataclass
class Found:
    """What one load brought."""

    answered: int = 0
    tokens: int = 0
    gaps: list[float] = field(default_factory=list)
    firsts: list[float] = field(default_factory=list)
    """Seconds from each request to its first text."""
    seconds: float = 0.0
    api_cpu: float = 0.0
    engine_cpu: float = 0.0
    client_cpu: float = 0.0


class Client(asyncio.Protocol):
    """Sends requests one after the other on one connection, and looks no closer than it must."""

    def __init__(self, bodies: list[bytes], found: Found, done: asyncio.Future[None]) -> None:
        self._bodies, self._found, self._done = bodies, found, done
        self._tail = b""
        self._last = self._asked = 0.0
        self._has_text = False

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
        self._tail, self._last, self._has_text = b"", 0.0, False
        self._asked = time.perf_counter()
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
            elif not self._has_text:
                self._has_text = True
                found.firsts.append(now - self._asked)
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
    host, port = urlsplit(target.url).hostname or "", urlsplit(target.url).port or 80
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
