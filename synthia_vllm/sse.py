"""The hot path: what the engine says, as bytes on the socket.

A raw ASGI response. All of an event that does not change from token to token is made once per
request; per token there is the answer rule, one JSON string, and one send for all of a step.
"""

from __future__ import annotations

import asyncio
import time
from contextlib import aclosing
from typing import TYPE_CHECKING, Any, Final

from pydantic_core import to_json

from synthia_vllm.errors import ApiError, EngineFault

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Callable

    from starlette.types import Send

    from synthia_vllm.chat import Piece, Prepared, Reply
    from synthia_vllm.engine import Engine, Step
    from synthia_vllm.metrics import ModelSeries
    from synthia_vllm.protocol import Usage

DONE: Final = b"data: [DONE]\n\n"
_COMMENT: Final = b": waiting\n\n"  # not an event: clients pass over it


class Events:
    """The events of one streamed answer, as OpenAI's ``chat.completion.chunk``."""

    __slots__ = ("_greeted", "_head", "_tail")

    def __init__(self, answer_id: str, created: int, model: str, *, include_usage: bool) -> None:
        head = {"id": answer_id, "object": "chat.completion.chunk", "created": created}
        self._head = b"data: " + to_json(head | {"model": model})[:-1]
        # With usage asked for, OpenAI puts a null one in every event but the last.
        self._tail = b',"usage":null}\n\n' if include_usage else b"}\n\n"
        self._greeted: set[int] = set()

    def piece(self, index: int, piece: Piece) -> bytes:
        """The event for one piece of choice `index`; empty if there is nothing to tell."""
        text, logprobs, finish_reason, stop_reason = piece
        if not text and not logprobs and finish_reason is None:
            return b""
        delta = b'"content":' + to_json(text) if text else b""
        if index not in self._greeted:  # with the first text, not before it
            self._greeted.add(index)
            delta = b'"role":"assistant",' + (delta or b'"content":""')
        end = b"null}]"
        if finish_reason is not None:
            end = b'"%b","stop_reason":%b}]' % (finish_reason.encode(), to_json(stop_reason))
        return b'%b,"choices":[{"index":%d,"delta":{%b},"logprobs":%b,"finish_reason":%b%b' % (
            self._head,
            index,
            delta,
            b"null" if logprobs is None else to_json({"content": logprobs}),
            end,
            self._tail,
        )

    def usage(self, usage: Usage) -> bytes:
        """The event after the last choice: what it all took."""
        return b'%b,"choices":[],"usage":%b}\n\n' % (self._head, to_json(usage))


def error_event(error: ApiError) -> bytes:
    """The event that ends a stream which cannot go on; no ``[DONE]`` follows it."""
    return b"data: %b\n\n" % to_json(error.envelope())


async def stream_answer(
    prepared: Prepared,
    reply: Reply,
    engine: Engine,
    *,
    events: Events,
    send: Send,
    headers: list[tuple[bytes, bytes]],
    series: ModelSeries,
    arrived: float,
    keepalive: float,
) -> None:
    """Run `prepared` and send its answer.

    The response starts with the engine's first step. An `ApiError` before that is raised, to be
    answered with its own status; after that it is sent as the last event. With `keepalive`, the
    response starts after that many seconds at the latest, and as often a comment is sent while
    the first step is waited for, so that no proxy takes the connection for dead.
    """
    started = False
    last_text = arrived
    body: dict[str, Any] = {"type": "http.response.body", "more_body": True}

    async def start() -> None:
        nonlocal started
        started = True
        await send({"type": "http.response.start", "status": 200, "headers": headers})

    async def alive() -> None:
        if not started:
            await start()
        await send({**body, "body": _COMMENT})

    try:
        async with aclosing(engine.generate(prepared.work)) as generated:
            steps = _with_sign_of_life(generated, keepalive, alive) if keepalive else generated
            async for step in steps:
                chunk = b"".join([events.piece(*piece) for piece in reply.take(step)])
                if not started:
                    await start()
                if chunk:
                    now = time.perf_counter()
                    latency = now - last_text
                    if last_text == arrived:
                        series.time_to_first_token.observe(latency)
                    else:
                        series.inter_token_latency.observe(latency)
                    last_text = now
                    if not reply.open_choices:
                        break
                    await send({**body, "body": chunk})
            else:
                raise EngineFault  # the engine stopped without ending every choice
    except ApiError as error:
        if not started:
            raise
        chunk = error_event(error)
    else:
        if prepared.include_usage:
            chunk += events.usage(reply.usage())
        chunk += DONE
    await send({"type": "http.response.body", "body": chunk})


async def _with_sign_of_life(
    steps: AsyncGenerator[Step, None], seconds: float, alive: Callable[[], Awaitable[None]]
) -> AsyncGenerator[Step, None]:
    """`steps`; while the first of them is waited for, `alive` is called every `seconds`."""
    first = asyncio.ensure_future(anext(steps))
    try:
        while not (await asyncio.wait((first,), timeout=seconds))[0]:
            await alive()
        yield first.result()
    except StopAsyncIteration:
        return
    finally:
        first.cancel()
        await asyncio.wait((first,))
    async for step in steps:
        yield step
