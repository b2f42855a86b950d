"""A request for text and its response, from the socket to the engine and back.

Each route for text is an ASGI application of its own. No middleware and no framework stand between
it and the socket, for it carries every token.
"""

from __future__ import annotations

import asyncio
import logging
import time
from typing import TYPE_CHECKING, Any, Final

from pydantic_core import to_json

from synthia_vllm.errors import ApiError, DeadlineExceeded, EngineFault
from synthia_vllm.generate.call import Call
from synthia_vllm.generate.response import ResponseCollector, ResponseState
from synthia_vllm.http.body import (
    IGNORED,
    ClientLeft,
    deadline,
    identify,
    read_body,
)
from synthia_vllm.http.connection import CONNECTION
from synthia_vllm.http.errors import error_response, request_id
from synthia_vllm.http.sse import Stream, stream_answer
from synthia_vllm.ledger.rows import UNKNOWN, Used

if TYPE_CHECKING:
    from starlette.types import Message, Receive, Scope, Send

    from synthia_vllm.admission.permits import AdmissionPermit
    from synthia_vllm.generate.response import Prepared
    from synthia_vllm.http.connection import Connection
    from synthia_vllm.http.route import GenerationRoute
    from synthia_vllm.http.state import ServerState

logger = logging.getLogger(__name__)

CLIENT_LEFT: Final = 499  # as nginx counts it; never sent, for nobody is there to read it


class Endpoint:
    """Takes one request at a time off the socket and sees it to its end."""

    def __init__(self, state: ServerState, route: GenerationRoute) -> None:
        self._state = state
        self._route = route

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        state = self._state
        headers = dict(scope["headers"])
        exchange = _Exchange(state, self._route, headers, send, scope["extensions"][CONNECTION])
        state.open(exchange)
        try:
            permit = await exchange.admit()
            await exchange.run_while_wanted(receive, permit)
        except ClientLeft:
            exchange.status = CLIENT_LEFT
        except ApiError as error:
            await exchange.refuse(error)
        except Exception:
            logger.exception("request %s: a fault of the server's own", exchange.id)
            await exchange.refuse(EngineFault())
        finally:
            exchange.record()
            state.closed(exchange)


class _Exchange:
    """One request and its response; knows at every moment what has happened so far."""

    def __init__(
        self,
        state: ServerState,
        route: GenerationRoute,
        headers: dict[bytes, bytes],
        send: Send,
        connection: Connection,
    ) -> None:
        self._state = state
        self._route = route
        self._request_headers = headers
        self._send = send
        self._connection = connection
        self._arrived = time.perf_counter()
        self._span = None
        if state.tracer:
            self._span = state.tracer.begin(headers, route.path, route.operation)
        self._error: str | None = None
        self.id = request_id(headers)
        self._user: str | None = None
        self._permit: AdmissionPermit | None = None
        self._prepared: Prepared | None = None
        self._response: ResponseState | None = None
        self._stream: Stream | None = None
        self._task: asyncio.Task[Any] | None = None  # while it may be ended
        self._ended_by: ApiError | ClientLeft | None = None
        self._ignored: tuple[str, ...] = ()
        self._started = False
        self.status = 500

    async def admit(self) -> AdmissionPermit:
        """Decide, before anything is done for it, whether this request can be had now."""
        state = self._state
        self._user = identify(state, self._request_headers)
        state.require_serving()
        self._permit = permit = await state.admission.admit(self._user)
        return permit

    async def run_while_wanted(self, receive: Receive, permit: AdmissionPermit) -> None:
        """Answer, unless the client leaves, the time is up, or the server ends it first."""
        limits = self._state.settings.limits
        seconds = deadline(self._request_headers, limits.request_seconds)
        body = await read_body(self._request_headers, receive, limits.max_body_bytes)
        left = seconds - (time.perf_counter() - self._arrived)
        # In this very task: none is made for the work, and none to wait for the client to leave.
        self._task = task = asyncio.current_task()
        self._connection.on_left(lambda: self.end(ClientLeft()))
        try:
            async with asyncio.timeout(left) as clock:
                await self._answer(body, permit)
        except asyncio.CancelledError:
            if self._ended_by is None or task is None:
                raise
            task.uncancel()
            raise self._ended_by from None
        except TimeoutError:
            if not clock.expired():
                raise
            raise DeadlineExceeded(seconds) from None
        finally:
            # An error's traceback holds this frame: with the error in it, or the body, these would
            # stay in memory until the garbage collector comes round.
            self._task = self._ended_by = None
            self._connection.on_left(None)  # which may be kept alive, and would keep all of this
            del body

    def end(self, error: ApiError | ClientLeft) -> None:
        """End this exchange with `error`, whatever it is at; the first word counts."""
        if self._task is not None and self._ended_by is None:
            self._ended_by = error
            self._task.cancel()

    async def _answer(self, body: bytes, permit: AdmissionPermit) -> None:
        state, route = self._state, self._route
        trace_headers = self._span.headers if self._span else None
        call = Call(self.id, body, permit, state.engine, state.settings, trace_headers)
        self._prepared = prepared = await route.prepare(call)
        self._ignored = prepared.request.ignored
        if self._ignored:
            state.note_ignored(self._ignored)
        self._response = response = ResponseState(
            prepared,
            self.id,
            began=permit.began,
            keep_text=state.keeps_text,
            fingerprint=state.fingerprint,
        )
        if prepared.stream:
            headers = self._headers(b"text/event-stream; charset=utf-8")
            headers.append((b"cache-control", b"no-cache"))
            headers.append((b"x-accel-buffering", b"no"))  # proxies: pass on each event at once
            self._stream = stream = Stream(
                response,
                route.events(response),
                state.writes,
                state.metrics.of(prepared.model),
                arrived=self._arrived,
                write=self._connection.write_part,
            )
            await stream_answer(
                response,
                state.engine,
                stream,
                send=self._sent,
                headers=headers,
                keepalive=state.settings.sse_keepalive_seconds,
            )
        else:
            collector = ResponseCollector(response)
            async with prepared.submit(state.engine, collector):
                choices = await collector.choices()
            answer = to_json(route.body(response, choices))
            headers = self._headers(b"application/json")
            headers.append((b"content-length", b"%d" % len(answer)))
            await self._respond(200, headers, answer)

    async def refuse(self, error: ApiError) -> None:
        """Answer with `error`; as an event, if a stream has begun."""
        self._state.count_error(error, self._route.path, self._user)
        self._error = error.code
        if self._started and self._stream is not None:
            end = self._stream.rest() + self._stream.events.error(error)
            await self._send({"type": "http.response.body", "body": end})
            return
        await self._respond(*error_response(error, self.id, self._facts(), self._route.envelope))

    def record(self) -> None:
        """Count and log this exchange, whatever way it ended, and give its permit back."""
        metrics, prepared, response = self._state.metrics, self._prepared, self._response
        model = prepared.model if prepared else ""
        prompt = response.prompt_tokens if response else 0
        answer = response.answer_tokens if response else 0
        ends = response.finish_reasons if response else []
        took = time.perf_counter() - self._arrived
        if self._permit is not None:
            self._permit.leave(prompt, answer, len(ends))
        metrics.requests.labels(self._route.path, model, str(self.status)).inc()
        if self.status == CLIENT_LEFT:
            metrics.aborted_by_client.labels(model).inc()
        if prepared is not None and response is not None:
            series = metrics.of(model)
            series.end_to_end.observe(took)
            series.time_per_output_token.observe_all(response.token_seconds)
            self._state.count_response(response, self._user)
        if prepared and prepared.conversation and response and not response.open_choices:
            self._state.keep(self._user or "", prepared.question, response.texts)
        used = Used(
            user=self._user or UNKNOWN,
            model=model or UNKNOWN,
            route=self._route.path,
            refused=self.status >= 400 and self.status != CLIENT_LEFT,
            prompt_tokens=prompt,
            cached_tokens=response.cached_tokens if response else 0,
            answer_tokens=answer,
            seconds=took,
        )
        self._log(used)
        self._state.account(used)
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
                    "synthia.cached_tokens": response.cached_tokens if response else 0,
                    "synthia.time_to_first_token": self._time_to_first_token(),
                },
            )

    def _log(self, used: Used) -> None:
        if not logger.isEnabledFor(logging.INFO):
            return
        prepared, response = self._prepared, self._response
        first = self._time_to_first_token()
        fields: dict[str, Any] = {
            "id": self.id,
            "user": used.user,
            "model": used.model,
            "status": self.status,
            "prompt_tokens": used.prompt_tokens,
            "cached_tokens": used.cached_tokens,
            "answer_tokens": used.answer_tokens,
            "first_token_ms": None if first is None else round(1e3 * first),
            "total_ms": round(1e3 * used.seconds),
            "finish": ",".join(response.finish_reasons) if response else "",
        }
        if self._state.settings.log_content and prepared and response:
            fields |= {"prompt": prepared.question, "answers": response.texts}
        logger.info(self._route.operation, extra={"fields": fields})

    def _time_to_first_token(self) -> float | None:
        """Seconds from the request's arrival to a stream's first text; none for a plain answer."""
        at = self._response.first_text_at if self._response else None
        return None if at is None else at - self._arrived

    def _headers(self, content_type: bytes) -> list[tuple[bytes, bytes]]:
        return [
            (b"content-type", content_type),
            (b"x-request-id", self.id.encode()),
            *self._facts(),
        ]

    def _facts(self) -> list[tuple[bytes, bytes]]:
        """Headers that say something of the user and of the request."""
        headers = [(name, self.id.encode()) for name in self._route.id_headers]
        if self._user is not None:
            headers += self._state.admission.headers(self._user)
        if self._prepared is not None and self._prepared.dropped_messages:
            dropped = str(self._prepared.dropped_messages).encode()
            headers.append((b"x-synthia-dropped-messages", dropped))
        if self._ignored:
            headers.append((IGNORED, ", ".join(self._ignored).encode()))
        return headers

    async def _respond(self, status: int, headers: list[tuple[bytes, bytes]], body: bytes) -> None:
        await self._sent({"type": "http.response.start", "status": status, "headers": headers})
        await self._send({"type": "http.response.body", "body": body})

    async def _sent(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._started = True
            self.status = message["status"]
        await self._send(message)
