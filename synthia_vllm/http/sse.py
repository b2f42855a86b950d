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
from typing import TYPE_CHECKING, Any, ClassVar, Final

from pydantic_core import to_json

from synthia_vllm.api.completions.serving import logprobs_of
from synthia_vllm.errors import ApiError, EngineFault
from synthia_vllm.http.errors import error_event

if TYPE_CHECKING:
    from collections.abc import Callable

    from starlette.types import Send

    from synthia_vllm.engine.base import Engine, Output
    from synthia_vllm.generate.protocol import Usage
    from synthia_vllm.generate.response import Piece, Prepared, Reply
    from synthia_vllm.telemetry.metrics import ModelSeries

logger = logging.getLogger(__name__)

WRITE: Final = "synthia.write"
"""The ASGI extension whose entry ``part`` is a `Stream`'s `write`."""
DONE: Final = b"data: [DONE]\n\n"
_GAPS_AT_ONCE: Final = 64  # some seconds of a stream: metrics are not later than a scrape
_COMMENT: Final = b": waiting\n\n"  # not an event: clients pass over it


def _json(value: Any) -> bytes:
    """JSON in ASCII: some readers of events end lines at U+2028, U+2029 and U+0085, too."""
    return to_json(value, ensure_ascii=True)


class Events:
    """The events of one streamed answer: what they have in common."""

    __slots__ = ("_head", "_prompt_of", "_prompts", "_so_far", "_tail")
    kind: ClassVar[str]

    def __init__(self, answer_id: str, created: int, prepared: Prepared, reply: Reply) -> None:
        head = {"id": answer_id, "object": self.kind, "created": created, "model": prepared.model}
        self._head = b"data: " + to_json(head)[:-1]
        # With usage asked for, OpenAI puts a null one in every event but the last.
        self._tail = b"}\n\n" if prepared.usage == "never" else b',"usage":null}\n\n'
        self._so_far = reply.usage if prepared.usage == "each" else None
        # Those whose prompt's tokens are still to be shown, and where to find them.
        self._prompts = set(range(reply.open_choices)) if prepared.show_token_ids else set[int]()
        self._prompt_of = prepared.prompt_of

    def tail(self) -> bytes:
        """The end of an event with text."""
        if self._so_far is None:
            return self._tail
        return b',"usage":%b}\n\n' % to_json(self._so_far())

    def piece(self, piece: Piece) -> bytes:
        """The event for one piece of an answer."""
        raise NotImplementedError

    def usage(self, usage: Usage) -> bytes:
        """The event after the last choice: what it all took."""
        return b'%b,"choices":[],"usage":%b}\n\n' % (self._head, to_json(usage))


class ChatEvents(Events):
    """As OpenAI's chat has them; the first of each choice brings the role, with the text."""

    __slots__ = ("_greeted",)
    kind = "chat.completion.chunk"

    def __init__(self, answer_id: str, created: int, prepared: Prepared, reply: Reply) -> None:
        super().__init__(answer_id, created, prepared, reply)
        self._greeted: set[int] = set()

    def piece(self, piece: Piece) -> bytes:
        """The event for one piece of an answer."""
        index, text, logprobs, finish_reason, stop_reason, token_ids, _ = piece
        delta = b'"content":' + _json(text) if text else b""
        if index not in self._greeted:  # with the first text, not before it
            self._greeted.add(index)
            delta = b'"role":"assistant",' + (delta or b'"content":""')
        end = b"null"
        if finish_reason is not None:
            end = b'"%b","stop_reason":%b' % (finish_reason.encode(), _json(stop_reason))
        end += b"}]" if token_ids is None else self._tokens(token_ids)
        return b'%b,"choices":[{"index":%d,"delta":{%b},"logprobs":%b,"finish_reason":%b%b' % (
            self._head,
            index,
            delta,
            b"null" if logprobs is None else _json({"content": logprobs}),
            end,
            self.tail(),
        )

    def _tokens(self, token_ids: list[int]) -> bytes:
        """The end of a choice that shows its tokens; the first event has the prompt's, too."""
        shown = b',"token_ids":%b}]' % to_json(token_ids)
        if self._prompts:
            self._prompts.clear()
            shown += b',"prompt_token_ids":%b' % to_json(self._prompt_of(0))
        return shown


class TextEvents(Events):
    """As OpenAI's completions have them."""

    __slots__ = ()
    kind = "text_completion"

    def piece(self, piece: Piece) -> bytes:
        """The event for one piece of an answer."""
        choice = {
            "index": piece.choice,
            "text": piece.text,
            "logprobs": logprobs_of(piece.logprobs),
            "finish_reason": piece.finish_reason,
            "stop_reason": piece.stop_reason,
        }
        if piece.token_ids is not None:
            choice["token_ids"] = piece.token_ids
            if piece.choice in self._prompts:
                self._prompts.discard(piece.choice)
                choice["prompt_token_ids"] = self._prompt_of(piece.choice)
        return b'%b,"choices":[%b]%b' % (self._head, _json(choice), self.tail())


class Outbox:
    """Streams that have something to write, until the event loop comes round again.

    So what is written for a stream in one round is one event and one system call, which is the
    dearest part of a token. A loop that keeps up has one step of the engine in a round, and loses
    microseconds; one that is behind finds several, and gains what it needs to catch up.
    """

    __slots__ = ("_streams",)

    def __init__(self) -> None:
        self._streams: list[Stream] = []

    def add(self, stream: Stream) -> None:
        """Have `stream` flushed in this round."""
        if not self._streams:
            asyncio.get_running_loop().call_soon(self._flush)
        self._streams.append(stream)

    def _flush(self) -> None:
        streams, self._streams = self._streams, []
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
        "_direct",
        "_error",
        "_gaps",
        "_kept",
        "_last_text",
        "_outbox",
        "_reply",
        "_series",
        "_wake",
        "_write",
        "events",
    )

    def __init__(
        self,
        reply: Reply,
        events: Events,
        outbox: Outbox,
        series: ModelSeries,
        *,
        arrived: float,
        write: Callable[[bytes], bool] | None,
    ) -> None:
        self.events = events
        self._reply = reply
        self._outbox = outbox
        self._series = series
        self._arrived = arrived
        self._write = write
        self._direct: Callable[[bytes], bool] | None = None
        self._kept: dict[int, Piece] = {}
        self._error: ApiError | None = None
        self._wake: asyncio.Future[None] | None = None
        self._last_text: float | None = None
        self._gaps: list[float] = []

    def put(self, output: Output, cached_tokens: int) -> None:
        """Take what the engine says next."""
        try:
            piece = self._reply.take(output, cached_tokens)
        except ApiError as error:
            self.fail(error)
            return
        except Exception:  # the caller serves every other request, too
            self._break()
            return
        if piece is None:
            return
        if piece.text:
            self._note_text()
        kept = self._kept
        before = kept.get(piece.choice)
        if before is not None:
            kept[piece.choice] = before.then(piece)
        else:
            if not kept and self._direct is not None:
                self._outbox.add(self)
            kept[piece.choice] = piece
        if self._direct is None or not self._reply.open_choices:
            self._wake_up()

    def fail(self, error: ApiError) -> None:
        """End the stream with `error`, after what was kept."""
        self._error = error
        self._wake_up()

    def ran(self, index: int, tokens: int, cached_tokens: int) -> None:
        """Count what ran."""
        self._reply.ran(index, tokens, cached_tokens)

    def flush(self) -> None:
        """Write what is kept; the last of it is the task's, which has more to say."""
        if self._direct is None or not self._kept or not self._reply.open_choices:
            return
        try:
            if not self._direct(self._take()):
                self._direct = None
        except Exception:  # the caller has other streams to flush
            self._break()

    async def kept(self, seconds: float | None) -> bytes:
        """Wait for what cannot be written at once, and return its events.

        Raises `TimeoutError` after `seconds`, and the engine's error when nothing is kept any
        more.
        """
        if not self._kept and self._error is None:
            self._wake = asyncio.get_running_loop().create_future()
            try:
                async with asyncio.timeout(seconds):
                    await self._wake
            finally:
                self._wake = self._direct = None
        if not self._kept and self._error is not None:
            raise self._error
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
        return b"".join([self.events.piece(piece) for piece in kept.values()])

    def _note_text(self) -> None:
        now = time.perf_counter()
        if self._last_text is None:
            self._series.time_to_first_token.observe(now - self._arrived)
        else:
            self._gaps.append(now - self._last_text)
            if len(self._gaps) == _GAPS_AT_ONCE:
                self.count()
        self._last_text = now

    def _wake_up(self) -> None:
        if self._wake is not None and not self._wake.done():
            self._wake.set_result(None)


async def stream_answer(
    prepared: Prepared,
    reply: Reply,
    engine: Engine,
    stream: Stream,
    *,
    send: Send,
    headers: list[tuple[bytes, bytes]],
    keepalive: float,
) -> None:
    """Run `prepared` and send its answer through `stream`.

    The response starts with the engine's first step. An `ApiError` before that is raised, to be
    answered with its own status; after that it is sent as the last event. With `keepalive`, the
    response starts after that many seconds at the latest, and as often a comment is sent while
    the first step is waited for, so that no proxy takes the connection for dead.
    """
    started = False
    patience = keepalive or None
    body: dict[str, Any] = {"type": "http.response.body", "more_body": True}
    try:
        async with prepared.submit(engine, stream):
            while True:
                try:
                    chunk = await stream.kept(patience if reply.began_at is None else None)
                except TimeoutError:
                    chunk = _COMMENT
                if not started:
                    started = True
                    await send({"type": "http.response.start", "status": 200, "headers": headers})
                if not reply.open_choices:
                    break
                if chunk:
                    await send({**body, "body": chunk})
                stream.go_direct()
    except ApiError as error:
        if not started:
            raise
        chunk = error_event(error)
    else:
        if prepared.usage != "never":
            chunk += stream.events.usage(reply.usage())
        chunk += DONE
    finally:
        stream.count()
    await send({"type": "http.response.body", "body": chunk})
