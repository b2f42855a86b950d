"""The hot path: what the engine says, as bytes on the socket.

The engine calls `Stream.put` with each output of a request. As long as the client keeps up, it is
written in the same round of the event loop: no task is woken, no queue is filled. All of an event
that does not change from token to token is made once per request; per token there is the answer
rule, one JSON string, and one write.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from typing import TYPE_CHECKING, Any, Final, Protocol

from synthia_vllm.errors import ApiError, EngineFault

if TYPE_CHECKING:
    from collections.abc import Callable

    from starlette.types import Send

    from synthia_vllm.engine.base import Engine, Output
    from synthia_vllm.generate.response import Delta, ResponseState
    from synthia_vllm.telemetry.metrics import ModelSeries

logger = logging.getLogger(__name__)

_GAPS_AT_ONCE: Final = 64  # some seconds of a stream: metrics are not later than a scrape
_COMMENT: Final = b": waiting\n\n"  # not an event: clients pass over it


class Events(Protocol):
    """The bytes of one streamed answer, which are its route's to choose."""

    def open(self) -> bytes:
        """What comes before the first text."""

    def delta(self, delta: Delta) -> bytes:
        """What was added to one choice."""

    def close(self) -> bytes:
        """What comes after the last choice's end."""

    def error(self, error: ApiError) -> bytes:
        """What ends a stream that cannot go on."""


class WriteBatcher:
    """Streams that have something to write, until the event loop comes round again.

    So what is written for a stream in one round is one event and one system call, which is the
    dearest part of a token. A loop that keeps up has one step of the engine in a round, and loses
    microseconds; one that is behind finds several, and gains what it needs to catch up.
    """

    __slots__ = ("_streams", "gaps", "latest_gaps")

    def __init__(self) -> None:
        self._streams: list[Stream] = []
        self.gaps = 0
        """Rounds so far, which are steps of the engine where the loop keeps up."""
        self.latest_gaps: deque[float] = deque(maxlen=_GAPS_AT_ONCE)
        """Seconds that one stream in each of the latest had waited for a token."""

    def add(self, stream: Stream) -> None:
        """Have `stream` flushed in this round."""
        if not self._streams:
            asyncio.get_running_loop().call_soon(self._flush)
        self._streams.append(stream)

    def _flush(self) -> None:
        streams, self._streams = self._streams, []
        if streams[0].gap:
            self.gaps += 1
            self.latest_gaps.append(streams[0].gap)
        for stream in streams:
            stream.flush()


class Stream:
    """One streamed answer between the engine, for which it is a `Sink`, and the socket.

    `write` takes bytes of the response's body at once, without waiting, and says whether the
    client keeps up; `None` if the server has no such thing. What comes before the response has
    begun, or while the client is behind, is put together here until the request's task sends it:
    never more than the answer itself.
    """

    __slots__ = (
        "_arrived",
        "_batcher",
        "_direct",
        "_error",
        "_gaps",
        "_kept",
        "_last_text",
        "_series",
        "_state",
        "_wake",
        "_write",
        "events",
        "gap",
    )

    def __init__(
        self,
        state: ResponseState,
        events: Events,
        batcher: WriteBatcher,
        series: ModelSeries,
        *,
        arrived: float,
        write: Callable[[bytes], bool] | None,
    ) -> None:
        self.events = events
        self._state = state
        self._batcher = batcher
        self._series = series
        self._arrived = arrived
        self._write = write
        self._direct: Callable[[bytes], bool] | None = None
        self._kept: dict[int, Delta] = {}
        self._error: ApiError | None = None
        self._wake: asyncio.Future[None] | None = None
        self._last_text: float | None = None
        self._gaps: list[float] = []
        self.gap = 0.0
        """Seconds between the last text and the one before it, for each token of it."""

    def put(self, output: Output, cached_tokens: int) -> bool:
        """Take what the engine says next."""
        try:
            delta = self._state.take(output, cached_tokens)
        except ApiError as error:
            self.fail(error)
            return False
        except Exception:  # the caller serves every other request, too
            self._break()
            return False
        if delta is None:
            return False
        if delta.text:
            self._note_text(len(output.token_ids))
        kept = self._kept
        before = kept.get(delta.choice)
        if before is not None:
            kept[delta.choice] = before.then(delta)
        else:
            if not kept and self._direct is not None:
                self._batcher.add(self)
            kept[delta.choice] = delta
        if self._direct is None or not self._state.open_choices:
            self._wake_up()
        return bool(delta.text)

    def fail(self, error: ApiError) -> None:
        """End the stream with `error`, after what was kept."""
        self._error = error
        self._wake_up()

    def ran(self, index: int, tokens: int, cached_tokens: int) -> None:
        """Count what ran."""
        self._state.ran(index, tokens, cached_tokens)

    def flush(self) -> None:
        """Write what is kept; the last of it is the task's, which has more to say."""
        if self._direct is None or not self._kept or not self._state.open_choices:
            return
        try:
            chunk = self._take()
            if chunk and not self._direct(chunk):  # an empty chunk would end the body
                self._direct = None
        except Exception:  # the caller has other streams to flush
            self._break()

    async def kept(self, seconds: float | None) -> bytes:
        """Wait for what cannot be written at once, and return its events.

        Raises `TimeoutError` after `seconds`, and the engine's error when nothing is kept any
        more.
        """
        if not self._kept and self._error is None:
            loop = asyncio.get_running_loop()
            self._wake = loop.create_future()
            clock = None if seconds is None else loop.call_later(seconds, self._tire)
            try:
                await self._wake
            finally:
                self._wake = self._direct = None
                if clock is not None:
                    clock.cancel()
        if not self._kept and self._error is not None:
            raise self._error
        return self._take()

    def rest(self) -> bytes:
        """The events of what is kept, when nobody waits for it any more."""
        self._direct = None
        return self._take()

    def go_direct(self) -> None:
        """The response has begun and the client took all: write what comes next at once."""
        if not self._kept:
            self._direct = self._write

    def count(self) -> None:
        """Add the gaps between texts to the metrics."""
        gaps, self._gaps = self._gaps, []
        self._series.inter_token_latency.observe_all(gaps)

    def _break(self) -> None:
        logger.exception("a stream broke: a fault of the server's own")
        self.fail(EngineFault())

    def _take(self) -> bytes:
        kept, self._kept = self._kept, {}
        return b"".join([self.events.delta(delta) for delta in kept.values()])

    def _note_text(self, tokens: int) -> None:
        now = time.perf_counter()
        if self._last_text is None:
            self._state.first_text_at = now
            self._series.time_to_first_token.observe(now - self._arrived)
        else:
            gap = now - self._last_text
            self.gap = gap / tokens if tokens else gap
            self._gaps.append(gap)
            if len(self._gaps) == _GAPS_AT_ONCE:
                self.count()
        self._last_text = now

    def _tire(self) -> None:
        if self._wake is not None and not self._wake.done():
            self._wake.set_exception(TimeoutError())

    def _wake_up(self) -> None:
        if self._wake is not None and not self._wake.done():
            self._wake.set_result(None)


async def stream_answer(
    state: ResponseState,
    engine: Engine,
    stream: Stream,
    *,
    send: Send,
    headers: list[tuple[bytes, bytes]],
    keepalive: float,
) -> None:
    """Run what `state` is the response to, and send its answer through `stream`.

    The response starts with the engine's first step. An `ApiError` before that is raised, to be
    answered with its own status; after that it is sent as the last event. With `keepalive`, the
    response starts after that many seconds at the latest, and as often a comment is sent while
    the first step is waited for, so that no proxy takes the connection for dead.
    """
    started = False
    patience = keepalive or None
    body: dict[str, Any] = {"type": "http.response.body", "more_body": True}
    try:
        async with state.prepared.submit(engine, stream):
            while True:
                try:
                    chunk = await stream.kept(None if state.begun else patience)
                except TimeoutError:
                    chunk = _COMMENT
                if not started:
                    started = True
                    await send({"type": "http.response.start", "status": 200, "headers": headers})
                    chunk = stream.events.open() + chunk
                if not state.open_choices:
                    break
                if chunk:
                    await send({**body, "body": chunk})
                stream.go_direct()
    except ApiError as error:
        if not started:
            raise
        chunk = stream.events.error(error)
    else:
        chunk += stream.events.close()
    finally:
        stream.count()
    await send({"type": "http.response.body", "body": chunk})
