"""What a token costs while all streams stream, and what a request costs, taken with care."""

from __future__ import annotations

import asyncio
import random
import time
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import count
from operator import itemgetter
from typing import TYPE_CHECKING, Final, cast

from lib.byte_client import Client, Found, Load, offer
from lib.report import percentile
from synthia_vllm.demo.training import dialogues

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from lib.servers import Running

TRIES: Final = 5
STALLED: Final = 0.05
"""A measurement is made again, up to `TRIES` times, if this script itself stood still for a larger
part of it: the least disturbed counts."""
_TEXT: Final = b" the"
"""Of the token that all answers are made of; the first has lost its space."""
_ANSWERS: Final = " ".join(turn.assistant for dialogue in dialogues() for turn in dialogue).split()
PROSE: Final = random.Random(0).sample(_ANSWERS, len(_ANSWERS))
"""Words in no order, so that every part of them has as many tokens."""


@dataclass
class Talk(Load):
    """A load whose conversations are `words` words of prose, cut into `messages` messages."""

    words: int = 4
    messages: int = 1

    def conversation(self, number: int) -> list[dict[str, str]]:
        """What request `number` asks."""
        words = (PROSE * (self.words // len(PROSE) + 1))[: self.words]
        size, rest = divmod(len(words), self.messages)
        contents, place = [], 0
        for i in range(self.messages):
            end = place + size + (i < rest)
            contents.append(" ".join(words[place:end]))
            place = end
        contents[0] = f"{number}: {contents[0]}"  # so that no prompt is in the prefix cache
        return [
            {"role": ("user", "assistant")[i % 2], "content": text}
            for i, text in enumerate(contents)
        ]


class Idle(asyncio.Protocol):
    """A connection that asked one thing, got its answer, and stays open."""

    def __init__(self, answered: asyncio.Future[None]) -> None:
        self._answered = answered
        self.open = True

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)  # uvloop's is not one by class
        self.transport.write(b"GET /ready HTTP/1.1\r\nHost: bench\r\n\r\n")

    def data_received(self, data: bytes) -> None:
        if not self._answered.done():
            self._answered.set_result(None)

    def connection_lost(self, exc: Exception | None) -> None:
        self.open = False
        if not self._answered.done():
            self._answered.set_exception(exc or ConnectionError("closed by the server"))


@contextmanager
def closed_at_end(connections: Sequence[Idle]) -> Iterator[None]:
    """Close `connections`. Raises `SystemExit` if the server did so before."""
    try:
        yield
        lost = sum(not connection.open for connection in connections)
        if lost:
            raise SystemExit(
                f"The server closed {lost} of {len(connections)} idle connections during the "
                "measurement, which took longer than it keeps them: ask for fewer --tokens."
            )
    finally:
        for connection in connections:
            connection.transport.close()


async def idle_connections(target: Running, number: int) -> list[Idle]:
    """Open `number` connections and have each answered once."""
    loop = asyncio.get_running_loop()
    host, port = target.url.removeprefix("http://").split(":")
    found, answers = [], []
    for _ in range(number):
        answered: asyncio.Future[None] = loop.create_future()
        _, protocol = await loop.create_connection(partial(Idle, answered), host, int(port))
        found.append(protocol)
        answers.append(answered)
    await asyncio.wait_for(asyncio.gather(*answers), 60)
    return found


class Window:
    """The time in which all of `streams` streams stream, and what was seen in it."""

    def __init__(self, target: Running, found: Found, streams: int) -> None:
        self._target, self._found, self._to_begin = target, found, streams
        self.clients: list[Watched] = []
        self._is_open = self._is_over = False
        self._begun = self._cpu = self._client_cpu = 0.0
        self.client_cpu = 0.0
        self.events = self.tokens = 0
        self.seconds = self.api_cpu = self.stall = 0.0
        self.gaps: list[float] = []

    def saw(self, events: int, tokens: int, *, first: bool) -> None:
        """Some stream brought `events` with text of `tokens`; `first` if it had brought none."""
        self._to_begin -= first
        if self._is_open:
            self.events += events
            self.tokens += tokens
        elif not self._to_begin and not self._is_over:
            self._is_open = True
            self._found.gaps.clear()
            for client in self.clients:
                client.restart()
            self._begun, self._cpu = time.perf_counter(), self._target.api_cpu()
            self._client_cpu = time.process_time()

    async def watch_stalls(self) -> None:
        """Note the longest that this process did not get to run: gaps up to that may be its own."""
        while True:
            begun = time.perf_counter()
            await asyncio.sleep(0.002)
            if self._is_open:
                self.stall = max(self.stall, time.perf_counter() - begun - 0.002)

    def close(self) -> None:
        """Some stream has ended."""
        if self._is_open:
            self.seconds = time.perf_counter() - self._begun
            self.api_cpu = self._target.api_cpu() - self._cpu
            self.client_cpu = time.process_time() - self._client_cpu
            self.gaps = list(self._found.gaps)
        self._is_open, self._is_over = False, True


class Watched(Client):
    """A client that tells `window` of what comes."""

    def __init__(
        self, window: Window, bodies: list[bytes], found: Found, done: asyncio.Future[None]
    ) -> None:
        super().__init__(bodies, found, done)
        self._window = window
        self._has_begun = False
        window.clients.append(self)

    def data_received(self, data: bytes) -> None:
        events = data.count(b'"content":')
        super().data_received(data)
        if events:
            self._window.saw(events, data.count(_TEXT), first=not self._has_begun)
            self._has_begun = True
        if self._found.answered:
            self._window.close()

    def restart(self) -> None:
        """Count no gap between what has come and what comes next."""
        self._last = 0.0


class NeverTogetherError(SystemExit):
    """At no time did all streams stream."""


class Meter:
    """Takes the measurements, with prompts numbered so that none comes twice."""

    def __init__(self, tokens: int, *, word: bool = True) -> None:
        self._tokens = tokens
        self._word = word  # see `Load`
        self._numbers = count(0, 10_000)

    async def per_token(
        self, target: Running, streams: int, tokens: int | None = None
    ) -> dict[str, float]:
        """What a token costs and the gaps between tokens, with `streams` streams at once.

        Of `tokens` each; else of fewer where there are many, so that no point takes long. Raises
        `NeverTogetherError`.
        """
        if tokens is None:  # they must outlast the time in which the last ones begin
            tokens = max(32, min(2 * self._tokens, 16 * self._tokens // streams))
        load = Talk("stream", streams, streams, tokens, True, self._word)
        # Where cores are few, this process may have to wait for one, while tokens pile up.
        tries = []
        for _ in range(TRIES):
            window, found = await self._stream(target, load)
            if window.events < streams:
                raise NeverTogetherError(
                    f"Some of {streams} streams ended before all had begun: ask for more --tokens, "
                    "or for --max-num-seqs if that is less."
                )
            tries.append((window.stall / window.seconds, window, found))
            if tries[-1][0] <= STALLED:
                break
        _, window, found = min(tries, key=itemgetter(0))
        seen = window.tokens
        return {
            "us_per_token": 1e6 * window.api_cpu / seen,
            "itl_p50_ms": 1e3 * percentile(window.gaps, 0.5),
            "itl_p99_ms": 1e3 * percentile(window.gaps, 0.99),
            "longest_gap_ms": 1e3 * max(window.gaps, default=0.0),
            "ttft_p50_ms": 1e3 * percentile(found.firsts, 0.5),
            "ttft_p99_ms": 1e3 * percentile(found.firsts, 0.99),
            "client_busy": window.client_cpu / window.seconds,
            "client_stall_ms": 1e3 * window.stall,
            "tokens": seen,
            "tokens_per_second": seen / window.seconds,
            "tokens_per_event": seen / window.events,
            "api_busy": window.api_cpu / window.seconds,
        }

    async def _stream(self, target: Running, load: Load) -> tuple[Window, Found]:
        found, offset = Found(), next(self._numbers)
        window = Window(target, found, load.connections)
        loop = asyncio.get_running_loop()
        host, port = target.url.removeprefix("http://").split(":")
        waiting = []
        for number in range(load.connections):
            done: asyncio.Future[None] = loop.create_future()
            client = partial(Watched, window, [load.body(offset + number)], found, done)
            await loop.create_connection(client, host, int(port))
            waiting.append(done)
        watching = asyncio.create_task(window.watch_stalls())
        try:
            await asyncio.wait_for(asyncio.gather(*waiting), 600)
        finally:
            watching.cancel()
        return window, found

    async def per_request(self, target: Running, load: Talk) -> dict[str, float]:
        """What a request of `load` costs."""
        found = await offer(target, load, next(self._numbers))
        return {"us_per_request": 1e6 * found.api_cpu / found.answered}
