"""``POST /v1/chat/completions`` as an ASGI application of its own.

No middleware and no framework stand between it and the socket, for it carries every token.
"""

from __future__ import annotations

import asyncio
import logging
import re
import time
import uuid
from contextlib import aclosing
from typing import TYPE_CHECKING, Any, Final

from pydantic_core import to_json

from synthia_vllm.chat import Prepared, Reply, prepare
from synthia_vllm.errors import ApiError, BodyTooLarge, EngineFault, InvalidRequest
from synthia_vllm.protocol import (
    AnswerMessage,
    ChatCompletion,
    Choice,
    ChoiceLogprobs,
    parse_chat_request,
)
from synthia_vllm.sse import Events, error_event, stream_answer

if TYPE_CHECKING:
    from collections.abc import Coroutine

    from starlette.types import Message, Receive, Scope, Send

    from synthia_vllm.engine import Engine
    from synthia_vllm.service import Service

logger = logging.getLogger(__name__)

CHAT: Final = "/v1/chat/completions"
_CLIENT_LEFT: Final = 499  # as nginx counts it; never sent, for nobody is there to read it
_REQUEST_ID: Final = re.compile(rb"[\x21-\x7e]{1,128}")


class ChatEndpoint:
    """Takes one chat request at a time off the socket and sees it to its end."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        arrived = time.perf_counter()
        service = self._service
        request_id = _request_id(scope)
        exchange = _Exchange(service, request_id, send, arrived)
        service.in_flight += 1
        service.metrics.in_flight.inc()
        try:
            service.require_serving()
            body = await _read_body(scope, receive, service.settings.limits.max_body_bytes)
            await _unless_client_leaves(receive, exchange.run(body))
        except _ClientLeft:
            exchange.status = _CLIENT_LEFT
        except ApiError as error:
            await exchange.refuse(error)
        except Exception:
            logger.exception("request %s: a fault of the server's own", request_id)
            await exchange.refuse(EngineFault())
        finally:
            service.in_flight -= 1
            service.metrics.in_flight.dec()
            exchange.record()


class _Exchange:
    """One chat request and its response; knows at every moment what has happened so far."""

    def __init__(self, service: Service, request_id: str, send: Send, arrived: float) -> None:
        self._service = service
        self._id = request_id
        self._send = send
        self._arrived = arrived
        self._prepared: Prepared | None = None
        self._reply: Reply | None = None
        self._started = False
        self.status = 500

    async def run(self, body: bytes) -> None:
        service = self._service
        request = parse_chat_request(body)
        self._prepared = prepared = await prepare(
            request, service.engine, service.settings, self._id
        )
        self._reply = reply = Reply(prepared, service.engine)
        answer_id, created = f"chatcmpl-{self._id}", int(time.time())
        if prepared.stream:
            events = Events(
                answer_id, created, prepared.model, include_usage=prepared.include_usage
            )
            headers = self._headers(b"text/event-stream; charset=utf-8")
            headers.append((b"cache-control", b"no-cache"))
            headers.append((b"x-accel-buffering", b"no"))  # proxies: pass on each event at once
            await stream_answer(
                prepared,
                reply,
                service.engine,
                events=events,
                send=self._sent,
                headers=headers,
                series=service.metrics.of(prepared.model),
                arrived=self._arrived,
            )
        else:
            choices = await _fold(prepared, reply, service.engine)
            answer = ChatCompletion(
                id=answer_id,
                created=created,
                model=prepared.model,
                choices=choices,
                usage=reply.usage(),
            )
            await self._respond(200, to_json(answer))

    async def refuse(self, error: ApiError) -> None:
        """Answer with `error`; as an event, if a stream has begun."""
        if self._started:
            await self._send({"type": "http.response.body", "body": error_event(error)})
            return
        extra = []
        if error.retry_after is not None:
            extra.append((b"retry-after", str(error.retry_after).encode()))
        await self._respond(error.status, to_json(error.envelope()), extra)

    def record(self) -> None:
        """Count this exchange, whatever way it ended."""
        metrics, prepared, reply = self._service.metrics, self._prepared, self._reply
        model = prepared.model if prepared else ""
        metrics.requests.labels(CHAT, model, str(self.status)).inc()
        took = time.perf_counter() - self._arrived
        if prepared is None or reply is None:
            logger.info("%s %s %d %.3fs", self._id, "-", self.status, took)
            return
        series = metrics.of(model)
        series.end_to_end.observe(took)
        series.escaped_markers.inc(prepared.escaped_markers)
        series.dropped_messages.inc(prepared.dropped_messages)
        if reply.began:
            series.prompt_tokens.inc(len(prepared.work.prompt_token_ids))
            series.cached_prompt_tokens.inc(reply.cached_tokens)
            series.answer_tokens.inc(reply.answer_tokens)
        for reason in reply.finish_reasons:
            metrics.finished.labels(model, reason).inc()
        if self.status == _CLIENT_LEFT:
            series.aborted_by_client.inc()
        logger.info(
            "%s %s %d %.3fs prompt=%d cached=%d answer=%d %s",
            self._id,
            model,
            self.status,
            took,
            len(prepared.work.prompt_token_ids),
            reply.cached_tokens,
            reply.answer_tokens,
            ",".join(reply.finish_reasons) or "-",
        )

    def _headers(self, content_type: bytes) -> list[tuple[bytes, bytes]]:
        headers = [(b"content-type", content_type), (b"x-request-id", self._id.encode())]
        if self._prepared is not None and self._prepared.dropped_messages:
            dropped = str(self._prepared.dropped_messages).encode()
            headers.append((b"x-synthia-dropped-messages", dropped))
        return headers

    async def _respond(
        self, status: int, body: bytes, extra: list[tuple[bytes, bytes]] | None = None
    ) -> None:
        headers = self._headers(b"application/json")
        headers.append((b"content-length", str(len(body)).encode()))
        headers += extra or []
        await self._sent({"type": "http.response.start", "status": status, "headers": headers})
        await self._send({"type": "http.response.body", "body": body})

    async def _sent(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._started = True
            self.status = message["status"]
        await self._send(message)


async def _fold(prepared: Prepared, reply: Reply, engine: Engine) -> list[Choice]:
    """The plain answer: the streamed one, put together."""
    count = prepared.work.sampling.n
    texts: list[list[str]] = [[] for _ in range(count)]
    places: list[list[Any]] = [[] for _ in range(count)]
    ends: list[tuple[Any, Any]] = [(None, None)] * count
    async with aclosing(engine.generate(prepared.work)) as steps:
        async for step in steps:
            for index, piece in reply.take(step):
                texts[index].append(piece.text)
                places[index] += piece.logprobs or ()
                ends[index] = (piece.finish_reason, piece.stop_reason)
            if not reply.open_choices:
                break
        else:
            raise EngineFault  # the engine stopped without ending every choice
    return [
        Choice(
            index=index,
            message=AnswerMessage(content="".join(texts[index])),
            logprobs=ChoiceLogprobs(content=places[index])
            if prepared.work.sampling.logprobs is not None
            else None,
            finish_reason=ends[index][0],
            stop_reason=ends[index][1],
        )
        for index in range(count)
    ]


class _ClientLeft(Exception):
    """The connection is gone; there is nobody to answer."""


async def _read_body(scope: Scope, receive: Receive, limit: int) -> bytes:
    """The whole body. Raises `InvalidRequest` if it is no JSON by its headers, or too large."""
    headers = dict(scope["headers"])
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
            raise _ClientLeft
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        if size > limit:
            raise BodyTooLarge(limit)
        if not message.get("more_body", False):
            return b"".join(parts)


async def _unless_client_leaves(receive: Receive, work: Coroutine[Any, Any, None]) -> None:
    """Run `work`; if the client goes away first, cancel it and raise `_ClientLeft`."""

    async def left() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    running, watching = asyncio.create_task(work), asyncio.create_task(left())
    try:
        await asyncio.wait((running, watching), return_when=asyncio.FIRST_COMPLETED)
        if not running.done():
            raise _ClientLeft
        running.result()
    finally:
        watching.cancel()
        if not running.done():
            running.cancel()
            await asyncio.wait((running,))  # until the engine has freed the request


def _request_id(scope: Scope) -> str:
    """The client's ``X-Request-Id``, if it is a sensible one, or a new id."""
    for name, value in scope["headers"]:
        if name == b"x-request-id" and _REQUEST_ID.fullmatch(value):
            return str(value, "ascii")
    return uuid.uuid4().hex
