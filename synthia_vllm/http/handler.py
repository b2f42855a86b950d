"""A request for text and its response, from the socket to the engine and back.

Each route for text is an ASGI application of its own. No middleware and no framework stand between
it and the socket, for it carries every token.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from asyncio import FIRST_COMPLETED
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Protocol

from pydantic_core import to_json

from synthia_vllm.errors import (
    ApiError,
    BodyTooLarge,
    DeadlineExceeded,
    EngineFault,
    InvalidRequest,
)
from synthia_vllm.generate.response import Choice, Piece, Prepared, Reply
from synthia_vllm.http.errors import error_event, error_response, request_id
from synthia_vllm.http.sse import WRITE, Events, Outbox, Stream, stream_answer

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from pydantic import BaseModel
    from starlette.types import Message, Receive, Scope, Send

    from synthia_vllm.admission.tenants import Place
    from synthia_vllm.engine.base import Engine, Output
    from synthia_vllm.generate.protocol import Usage
    from synthia_vllm.http.state import Service
    from synthia_vllm.settings import Settings

logger = logging.getLogger(__name__)

CLIENT_LEFT: Final = 499  # as nginx counts it; never sent, for nobody is there to read it
_TIMEOUT: Final = "X-Request-Timeout"
IGNORED: Final = b"x-synthia-ignored"
"""Names fields of the request that changed nothing."""


class Prepare(Protocol):
    """Makes work for the engine of a request's body, and the rule for its answers."""

    async def __call__(
        self,
        body: bytes,
        engine: Engine,
        settings: Settings,
        request_id: str,
        place: Place,
        *,
        trace_headers: Mapping[str, str] | None,
    ) -> tuple[Prepared, list[Choice]]: ...


class Answer(Protocol):
    """Makes the body of a plain answer."""

    def __call__(
        self, answer_id: str, created: int, prepared: Prepared, pieces: list[Piece], usage: Usage
    ) -> BaseModel: ...


@dataclass(frozen=True, slots=True)
class Route:
    """One kind of request for text: what differs between them."""

    path: str
    operation: str
    """Its name in OpenTelemetry's conventions, and in the log."""
    id_prefix: str
    prepare: Prepare
    events: type[Events]
    answer: Answer


class Endpoint:
    """Takes one request at a time off the socket and sees it to its end."""

    def __init__(self, service: Service, route: Route) -> None:
        self._service = service
        self._route = route
        self._outbox = Outbox()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        service = self._service
        write = scope.get("extensions", {}).get(WRITE, {}).get("part")
        headers = dict(scope["headers"])
        exchange = _Exchange(service, self._route, headers, send, write=write, outbox=self._outbox)
        service.open(exchange)
        try:
            place = await exchange.admit()
            await exchange.run_while_wanted(receive, place)
        except ClientLeft:
            exchange.status = CLIENT_LEFT
        except ApiError as error:
            await exchange.refuse(error)
        except Exception:
            logger.exception("request %s: a fault of the server's own", exchange.id)
            await exchange.refuse(EngineFault())
        finally:
            exchange.record()
            service.closed(exchange)


class _Exchange:
    """One request and its response; knows at every moment what has happened so far."""

    def __init__(
        self,
        service: Service,
        route: Route,
        headers: dict[bytes, bytes],
        send: Send,
        *,
        write: Callable[[bytes], bool] | None,
        outbox: Outbox,
    ) -> None:
        self._service = service
        self._route = route
        self._request_headers = headers
        self._send = send
        self._write = write
        self._outbox = outbox
        self._arrived = time.perf_counter()
        self._span = None
        if service.tracer:
            self._span = service.tracer.begin(headers, route.path, route.operation)
        self._error: str | None = None
        self.id = request_id(headers)
        self._user: str | None = None
        self._place: Place | None = None
        self._prepared: Prepared | None = None
        self._reply: Reply | None = None
        self._work: asyncio.Task[None] | None = None
        self._ended_by: ApiError | None = None
        self._started = False
        self.status = 500

    async def admit(self) -> Place:
        """Decide, before anything is done for it, whether this request can be had now."""
        service = self._service
        self._user = service.tenants.identify(self._request_headers.get(b"authorization"))
        service.require_serving()
        self._place = place = await service.tenants.admit(self._user)
        return place

    async def run_while_wanted(self, receive: Receive, place: Place) -> None:
        """Answer, unless the client leaves, the time is up, or the server ends it first."""
        limits = self._service.settings.limits
        seconds = _deadline(self._request_headers, limits.request_seconds)
        body = await read_body(self._request_headers, receive, limits.max_body_bytes)
        self._work = work = asyncio.create_task(self._answer(body, place))
        watching = asyncio.create_task(_client_left(receive))
        try:
            left = seconds - (time.perf_counter() - self._arrived)
            await asyncio.wait((work, watching), timeout=left, return_when=FIRST_COMPLETED)
            if work.cancelled() and self._ended_by is not None:
                raise self._ended_by
            if not work.done():
                raise ClientLeft if watching.done() else DeadlineExceeded(seconds)
            work.result()
        finally:
            watching.cancel()
            if not work.done():
                work.cancel()
                await asyncio.wait((work,))  # until the engine has freed the request
            # An error's traceback holds this frame, which holds the task, which holds the error:
            # bodies would stay in memory until the garbage collector comes round.
            self._work = None
            del work, watching, body

    def end(self, error: ApiError) -> None:
        """End this exchange with `error`, whatever it is at."""
        if self._work is not None and not self._work.done():
            self._ended_by = error
            self._work.cancel()

    async def _answer(self, body: bytes, place: Place) -> None:
        service, route = self._service, self._route
        prepared, choices = await route.prepare(
            body,
            service.engine,
            service.settings,
            self.id,
            place,
            trace_headers=self._span.headers if self._span else None,
        )
        self._prepared = prepared
        if prepared.ignored:
            service.note_ignored(prepared.ignored)
        self._reply = reply = Reply(
            prepared, choices, began=place.began, keep_text=service.keeps_text
        )
        answer_id, created = f"{route.id_prefix}-{self.id}", int(time.time())
        if prepared.stream:
            events = route.events(answer_id, created, prepared, reply)
            headers = self._headers(b"text/event-stream; charset=utf-8")
            headers.append((b"cache-control", b"no-cache"))
            headers.append((b"x-accel-buffering", b"no"))  # proxies: pass on each event at once
            stream = Stream(
                reply,
                events,
                self._outbox,
                service.metrics.of(prepared.model),
                arrived=self._arrived,
                write=self._write,
            )
            await stream_answer(
                prepared,
                reply,
                service.engine,
                stream,
                send=self._sent,
                headers=headers,
                keepalive=service.settings.sse_keepalive_seconds,
            )
        else:
            whole = _Whole(reply)
            async with prepared.submit(service.engine, whole):
                pieces = await whole.pieces()
            answer = to_json(
                route.answer(answer_id, created, prepared, pieces, reply.usage()),
            )
            headers = self._headers(b"application/json")
            headers.append((b"content-length", b"%d" % len(answer)))
            await self._respond(200, headers, answer)

    async def refuse(self, error: ApiError) -> None:
        """Answer with `error`; as an event, if a stream has begun."""
        self._service.count_error(error, self._route.path, self._user)
        self._error = error.code
        if self._started:
            await self._send({"type": "http.response.body", "body": error_event(error)})
            return
        await self._respond(*error_response(error, self.id, self._facts()))

    def record(self) -> None:
        """Count and log this exchange, whatever way it ended, and give its place back."""
        metrics, prepared, reply = self._service.metrics, self._prepared, self._reply
        model = prepared.model if prepared else ""
        prompt = reply.prompt_tokens if reply else 0
        answer = reply.answer_tokens if reply else 0
        ends = reply.finish_reasons if reply else []
        took = time.perf_counter() - self._arrived
        if self._place is not None:
            self._place.leave(prompt, answer, len(ends))
        metrics.requests.labels(self._route.path, model, str(self.status)).inc()
        if self.status == CLIENT_LEFT:
            metrics.aborted_by_client.labels(model).inc()
        if prepared is not None and reply is not None:
            series = metrics.of(model)
            series.end_to_end.observe(took)
            series.escaped_markers.inc(prepared.escaped_markers)
            series.dropped_messages.inc(prepared.dropped_messages)
            series.prompt_tokens.inc(prompt)
            series.cached_prompt_tokens.inc(reply.cached_tokens)
            series.answer_tokens.inc(answer)
            for reason in ends:
                metrics.finished.labels(model, reason).inc()
        if self._user is not None:
            self._service.count_tokens(self._user, prompt, answer)
        if prepared and prepared.conversation and reply and not reply.open_choices:
            self._service.keep(self._user or "", prepared.question, reply.texts)
        self._log(took, prompt, answer)
        if self._span is not None:
            self._span.end(
                self.status,
                self._error,
                {
                    "gen_ai.request.model": model,
                    "gen_ai.usage.input_tokens": prompt,
                    "gen_ai.usage.output_tokens": answer,
                    "gen_ai.response.finish_reasons": tuple(ends),
                    "synthia.request_id": self.id,
                    "synthia.user": self._user,
                    "synthia.stream": prepared.stream if prepared else None,
                    "synthia.cached_tokens": reply.cached_tokens if reply else 0,
                    "synthia.time_to_first_token": reply.began_at - self._arrived
                    if reply and reply.began_at
                    else None,
                },
            )

    def _log(self, took: float, prompt: int, answer: int) -> None:
        if not logger.isEnabledFor(logging.INFO):
            return
        prepared, reply = self._prepared, self._reply
        fields: dict[str, Any] = {
            "id": self.id,
            "user": self._user or "-",
            "model": prepared.model if prepared else "-",
            "status": self.status,
            "prompt_tokens": prompt,
            "cached_tokens": reply.cached_tokens if reply else 0,
            "answer_tokens": answer,
            "first_token_ms": round(1e3 * (reply.began_at - self._arrived))
            if reply and reply.began_at
            else None,
            "total_ms": round(1e3 * took),
            "finish": ",".join(reply.finish_reasons) if reply else "",
        }
        if self._service.settings.log_content and prepared and reply:
            fields |= {"prompt": prepared.question, "answers": reply.texts}
        logger.info(self._route.operation, extra={"fields": fields})

    def _headers(self, content_type: bytes) -> list[tuple[bytes, bytes]]:
        return [
            (b"content-type", content_type),
            (b"x-request-id", self.id.encode()),
            *self._facts(),
        ]

    def _facts(self) -> list[tuple[bytes, bytes]]:
        """Headers that say something of the user and of the request."""
        headers = []
        if self._user is not None:
            headers += self._service.tenants.headers(self._user)
        if self._prepared is not None and self._prepared.dropped_messages:
            dropped = str(self._prepared.dropped_messages).encode()
            headers.append((b"x-synthia-dropped-messages", dropped))
        if self._prepared is not None and self._prepared.ignored:
            headers.append((IGNORED, ", ".join(self._prepared.ignored).encode()))
        return headers

    async def _respond(self, status: int, headers: list[tuple[bytes, bytes]], body: bytes) -> None:
        await self._sent({"type": "http.response.start", "status": status, "headers": headers})
        await self._send({"type": "http.response.body", "body": body})

    async def _sent(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._started = True
            self.status = message["status"]
        await self._send(message)


class _Whole:
    """The plain answer: a sink that puts together what a stream would have sent."""

    def __init__(self, reply: Reply) -> None:
        self._reply = reply
        self._pieces: dict[int, Piece] = {}
        self._error: Exception | None = None
        self._over = asyncio.Event()

    def put(self, output: Output, cached_tokens: int) -> None:
        """Take what the engine says next."""
        try:
            piece = self._reply.take(output, cached_tokens)
        except Exception as error:  # the caller serves every other request, too
            self._end(error)
            return
        if piece is not None:
            before = self._pieces.get(piece.choice)
            self._pieces[piece.choice] = piece if before is None else before.then(piece)
        if not self._reply.open_choices:
            self._over.set()

    def fail(self, error: ApiError) -> None:
        """End with `error`."""
        self._end(error)

    def ran(self, index: int, tokens: int, cached_tokens: int) -> None:
        """Count what ran."""
        self._reply.ran(index, tokens, cached_tokens)

    async def pieces(self) -> list[Piece]:
        """Each choice, whole. Raises what ended the request before."""
        await self._over.wait()
        if self._error is not None:
            raise self._error
        return [self._pieces[choice] for choice in sorted(self._pieces)]

    def _end(self, error: Exception) -> None:
        self._error = error
        self._over.set()


class ClientLeft(Exception):
    """The connection is gone; there is nobody to answer."""


async def read_body(headers: dict[bytes, bytes], receive: Receive, limit: int) -> bytes:
    """The whole body. Raises `InvalidRequest` if it is no JSON by its headers, or too large.

    Raises `ClientLeft` if it does not come to its end.
    """
    kind = headers.get(b"content-type", b"").split(b";")[0].strip().lower()
    if kind != b"application/json":
        # Also what keeps other sites' pages from posting here: for this type browsers ask first.
        raise InvalidRequest("Send the body with `Content-Type: application/json`.")
    if headers.get(b"content-encoding", b"identity").strip().lower() != b"identity":
        raise InvalidRequest("The body must not be compressed (`Content-Encoding`).")
    if int(headers.get(b"content-length", b"0")) > limit:
        raise BodyTooLarge(limit)
    parts: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientLeft
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        if size > limit:
            raise BodyTooLarge(limit)
        if not message.get("more_body", False):
            return b"".join(parts)


async def _client_left(receive: Receive) -> None:
    """Return when the connection is gone."""
    while (await receive())["type"] != "http.disconnect":
        pass


def _deadline(headers: dict[bytes, bytes], longest: float) -> float:
    """The seconds this request may take: what it asks for, up to the server's own limit."""
    asked = headers.get(_TIMEOUT.lower().encode())
    if asked is None:
        return longest
    try:
        seconds = float(asked)
    except ValueError:
        seconds = math.nan
    if not seconds > 0:
        raise InvalidRequest(
            f"`{_TIMEOUT}` must be a number of seconds above 0.",
            param=_TIMEOUT,
            code="invalid_value",
        )
    return min(seconds, longest)
