"""What one connection may take from the server: bytes, time, and a place among the others.

Uvicorn bounds only the idle time between two requests. This protocol bounds the rest, with
timers that are set once per request: a token that is streamed costs nothing here.

uvicorn internal: `uvicorn.protocols.http.httptools_impl.STATUS_LINE`; what is overridden,
`uvicorn.protocols.http.httptools_impl.HttpToolsProtocol.connection_made`,
`uvicorn.protocols.http.httptools_impl.HttpToolsProtocol.connection_lost`,
`uvicorn.protocols.http.httptools_impl.HttpToolsProtocol.eof_received`,
`uvicorn.protocols.http.httptools_impl.HttpToolsProtocol.data_received`,
`uvicorn.protocols.http.httptools_impl.HttpToolsProtocol.on_message_begin`,
`uvicorn.protocols.http.httptools_impl.HttpToolsProtocol.on_headers_complete`,
`uvicorn.protocols.http.httptools_impl.HttpToolsProtocol.on_body`,
`uvicorn.protocols.http.httptools_impl.HttpToolsProtocol.on_message_complete`,
`uvicorn.protocols.http.httptools_impl.HttpToolsProtocol.pause_writing`,
`uvicorn.protocols.http.httptools_impl.HttpToolsProtocol.resume_writing`,
`uvicorn.protocols.http.httptools_impl.HttpToolsProtocol.send_400_response` and
`uvicorn.protocols.http.httptools_impl.HttpToolsProtocol.timeout_keep_alive_handler`; what is used,
`uvicorn.protocols.http.httptools_impl.HttpToolsProtocol._unset_keepalive_if_required`,
`uvicorn.protocols.http.httptools_impl.HttpToolsProtocol.timeout_keep_alive_task`,
`uvicorn.protocols.http.httptools_impl.HttpToolsProtocol.connections`,
`uvicorn.protocols.http.httptools_impl.HttpToolsProtocol.parser`,
`uvicorn.protocols.http.httptools_impl.HttpToolsProtocol.cycle`,
`uvicorn.protocols.http.httptools_impl.HttpToolsProtocol.scope`,
`uvicorn.protocols.http.httptools_impl.HttpToolsProtocol.headers`,
`uvicorn.protocols.http.httptools_impl.HttpToolsProtocol.url`,
`uvicorn.protocols.http.httptools_impl.HttpToolsProtocol.server_state`,
`uvicorn.protocols.http.flow_control.FlowControl.write_paused`,
`uvicorn.protocols.http.flow_control.FlowControl.resume_reading`,
`uvicorn.protocols.http.httptools_impl.RequestResponseCycle.keep_alive`,
`uvicorn.protocols.http.httptools_impl.RequestResponseCycle.chunked_encoding`,
`uvicorn.protocols.http.httptools_impl.RequestResponseCycle.expected_content_length`,
`uvicorn.protocols.http.httptools_impl.RequestResponseCycle.disconnected`,
`uvicorn.protocols.http.httptools_impl.RequestResponseCycle.response_started`,
`uvicorn.protocols.http.httptools_impl.RequestResponseCycle.response_complete`,
`uvicorn.protocols.http.httptools_impl.RequestResponseCycle.waiting_for_100_continue` and
`uvicorn.protocols.http.httptools_impl.RequestResponseCycle.message_event`.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Final, Protocol

import httptools
from uvicorn.protocols.http.httptools_impl import (
    STATUS_LINE,
    HttpToolsProtocol,
    RequestResponseCycle,
)

from synthia_vllm.errors import ApiError, InvalidRequest, Unavailable
from synthia_vllm.http.errors import error_response, request_id

if TYPE_CHECKING:
    from asyncio import TimerHandle, Transport
    from collections.abc import Callable

    from uvicorn._types import ASGISendEvent

logger = logging.getLogger(__name__)

_LINGER_SECONDS: Final = 1.0  # for a refused client to read why, and to hang up
_LAST_LOOK_SECONDS: Final = 0.01
_MEGABYTE: Final = 1_000_000
_MAX_SURPLUS_BYTES: Final = 1 << 20  # sent by a client after all that will be read from it


CONNECTION: Final = "synthia.connection"
"""The ASGI extension that is the request's `Connection`."""


class Connection(Protocol):
    """What an app may ask of the connection of its request besides what ASGI has."""

    def write_part(self, data: bytes) -> bool:
        """Write `data`, part of the body of a streamed response that has begun; never waits.

        Returns false if the client does not take what is written: then the next part had better
        go through ASGI's `send`, which waits for it.
        """

    def on_left(self, tell: Callable[[], None] | None) -> None:
        """Have `tell` called if the client leaves before it has the response; at once, if it has.

        It may be called more than once, until this is called with `None`.
        """


@dataclass(frozen=True, slots=True)
class ConnectionLimits:
    """The bounds of one connection."""

    max_header_bytes: int
    """Of the request line and the headers together; also of a chunked body's trailers."""
    max_connections: int
    """Open at the same time, idle ones included."""
    receive_seconds: float
    """For one request to come in, from its first byte to the last of its body."""
    stalled_seconds: float
    """For the client to take what is waiting for it."""
    max_upload_bytes: int = 0
    """A body of up to so many gets a second more for each megabyte that its headers announce."""


class RequestTimeout(InvalidRequest):
    """The request did not come in in time."""

    status = 408

    def __init__(self, seconds: float) -> None:
        super().__init__(
            f"The request was not complete within {seconds:g} seconds.", code="request_timeout"
        )


class HeadersTooLarge(InvalidRequest):
    """The request line and the headers exceed the server's limit."""

    status = 431

    def __init__(self, limit: int) -> None:
        super().__init__(
            f"The URL and the headers are larger than this server's limit of {limit} bytes.",
            code="headers_too_large",
        )


def guarded(
    limits: ConnectionLimits,
    *,
    leaving: Callable[[], bool] = lambda: False,
    on_error: Callable[[ApiError], None] = lambda _error: None,
) -> type[GuardedProtocol]:
    """The protocol with these limits, for ``uvicorn.Config(http=...)``.

    While `leaving` says so, each response closes its connection. `on_error` is told of each error
    that is answered here.
    """

    class Guarded(GuardedProtocol):
        _limits = limits

        def _told(self, error: ApiError) -> None:
            on_error(error)

        def _leaving(self) -> bool:
            return leaving()

    return Guarded


class GuardedProtocol(HttpToolsProtocol):
    """Uvicorn's protocol, with bounds. Each request is answered before the next one is read."""

    _limits: ClassVar[ConnectionLimits]
    _deadline: TimerHandle | None = None  # runs while a request comes in, and once refused
    _stalled: TimerHandle | None = None  # runs while the client does not take what is written
    _watch: TimerHandle | None = None
    _was_closing = False
    _tell_left: Callable[[], None] | None = None
    _refused = False
    _bare_bytes = 0  # read since the last byte of a body: heads, chunk sizes, trailers, surplus

    def connection_made(self, transport: Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self._limits.max_connections and not self._make_room():
            self.connections.discard(self)
            self._refuse(Unavailable("Too many connections are open.", code="too_many_connections"))
            return
        self._await_request()
        self._watch_closing()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._note_left()
        for timer in (self._deadline, self._stalled, self._watch):
            if timer is not None:
                timer.cancel()

    def eof_received(self) -> None:
        # Uvicorn would tell the app when all that is written has been taken: perhaps never.
        self._disconnect_app()

    def data_received(self, data: bytes) -> None:
        self._bare_bytes += len(data)
        if self._refused:
            self._discard()
            return
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as stop:
            self._decline_upgrade(data[stop.args[0] :])
        except httptools.HttpParserError:
            if self._answering():
                self._discard()
            else:
                self.send_400_response("This is not a valid HTTP request.")
        else:
            if self._bare_bytes > self._limits.max_header_bytes:
                self._refuse(HeadersTooLarge(self._limits.max_header_bytes))

    def on_message_begin(self) -> None:
        if self._answering():
            raise RuntimeError("pipelined")  # stops the parser; `data_received` sees to the rest
        # Only now, not with any byte: a line break between requests must not stop this timer.
        self._unset_keepalive_if_required()
        if self._deadline is None:
            self._await_request()
        self.cycle = None  # type: ignore[assignment]  # so that it is always this request's
        super().on_message_begin()
        self._tell_left = None
        # No dictionary, as others' extensions are: it would be made for each request.
        self.scope["extensions"] = {CONNECTION: self}  # type: ignore[dict-item]

    def on_headers_complete(self) -> None:
        size = len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers)
        if size > self._limits.max_header_bytes:
            self._refuse(HeadersTooLarge(self._limits.max_header_bytes))
            raise RuntimeError("headers too large")  # stops the parser
        if not self.parser.should_upgrade():
            super().on_headers_complete()
            if self.scope["http_version"] == "1.0":
                # Before its task runs; uvicorn makes it itself, and takes every client for a newer.
                self.cycle.__class__ = _UnchunkedCycle
            if self._leaving():
                self.cycle.keep_alive = False
            self._allow_for_upload()

    def on_body(self, body: bytes) -> None:
        self._bare_bytes = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        if self.parser.should_upgrade():
            return  # `_decline_upgrade` has it read again
        self._bare_bytes = 0
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None
        super().on_message_complete()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._stalled = self.loop.call_later(self._limits.stalled_seconds, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._stalled is not None:
            self._stalled.cancel()

    def write_part(self, data: bytes) -> bool:
        """As in `Connection`."""
        if not self.cycle.disconnected:
            chunked = self.cycle.chunked_encoding
            self.transport.write(b"%x\r\n%b\r\n" % (len(data), data) if chunked else data)
        return not self.flow.write_paused

    def on_left(self, tell: Callable[[], None] | None) -> None:
        """As in `Connection`."""
        self._tell_left = tell
        self._note_left()

    def send_400_response(self, msg: str) -> None:
        self._refuse(InvalidRequest(msg, code="invalid_http"))

    def timeout_keep_alive_handler(self) -> None:
        # A loop that stood still runs its timers before it reads what has come meanwhile: look once
        # more. A request that has begun by then cancels this.
        self.timeout_keep_alive_task = self.loop.call_later(
            _LAST_LOOK_SECONDS, super().timeout_keep_alive_handler
        )

    def _make_room(self) -> bool:
        """Close a connection that waits for its next request, if there is one."""
        for other in self.connections:
            if isinstance(other, GuardedProtocol) and other.timeout_keep_alive_task is not None:
                other.timeout_keep_alive_task.cancel()
                other.transport.close()
                self.connections.discard(other)
                return True
        return False

    def _told(self, error: ApiError) -> None:
        """The client was told of `error`."""

    def _leaving(self) -> bool:
        """Whether clients had better open their next connection elsewhere."""
        return False

    def _answering(self) -> bool:
        """A request has come in whole, and its response is not over."""
        cycle = self.cycle
        return self._deadline is None and cycle is not None and not cycle.response_complete

    def _await_request(self) -> None:
        seconds = self._limits.receive_seconds
        self._deadline = self.loop.call_later(seconds, self._refuse, RequestTimeout(seconds))

    def _allow_for_upload(self) -> None:
        """Give a large file the time it takes to come in, if it is sent at a fair pace."""
        size = int(next((value for name, value in self.headers if name == b"content-length"), 0))
        if self._deadline is not None and _MEGABYTE < size <= self._limits.max_upload_bytes:
            self._deadline.cancel()
            seconds = self._limits.receive_seconds + size / _MEGABYTE
            self._deadline = self.loop.call_later(seconds, self._refuse, RequestTimeout(seconds))

    def _refuse(self, error: ApiError) -> None:
        """End the connection; with `error` as the answer, if no other has begun."""
        if self._refused:
            return
        self._refused = True
        logger.debug("connection of %s refused: %s", self.client, error.code)
        if self._deadline is not None:
            self._deadline.cancel()
        self._deadline = self.loop.call_later(_LINGER_SECONDS, self.transport.abort)
        answered = self.cycle is not None and self.cycle.response_started
        self._disconnect_app()
        if answered:
            self.transport.close()
            return
        self._told(error)
        known = dict(self.headers) if self.cycle is not None else {}
        more = (*self.server_state.default_headers, (b"connection", b"close"))
        status, headers, body = error_response(error, request_id(known), more)
        lines = b"".join(b"%s: %s\r\n" % header for header in headers)
        self.transport.write(STATUS_LINE[status] + lines + b"\r\n" + body)
        # Only this side is closed, and what still comes is read and dropped: to close on unread
        # bytes resets the connection, and a reset can overtake the answer.
        self.transport.write_eof()
        self.flow.resume_reading()

    def _disconnect_app(self) -> None:
        """Let the app see `http.disconnect`, and drop what it still sends."""
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.disconnected = True
            self.cycle.waiting_for_100_continue = False  # it must not be written any more
            self.cycle.message_event.set()
            self._note_left()

    def _note_left(self) -> None:
        """Say so, if the client has left before it had the response."""
        cycle, tell = self.cycle, self._tell_left
        if tell is not None and cycle is not None and cycle.disconnected:
            tell()

    def _discard(self) -> None:
        """Drop what comes after all that counts, but go on reading, to notice a disconnect.

        So pipelined requests are never started: the connection ends with the response before
        them, as HTTP allows. Uvicorn would stop reading until then.
        """
        if not self._refused:
            self.cycle.keep_alive = False
        if self._bare_bytes > _MAX_SURPLUS_BYTES:
            self.transport.abort()

    def _decline_upgrade(self, rest: bytes) -> None:
        """Read a request again without its offer to upgrade, as the plain HTTP that it also is.

        The parser stops at the offer and would take a body for the other protocol's bytes; some
        clients (Java's, ``curl --http2``) send the offer with every request.
        """
        method = self.parser.get_method()
        if method == b"CONNECT":
            self.send_400_response("This server is not a proxy.")
            return
        lines = [b"%s %s HTTP/%s" % (method, self.url, self.parser.get_http_version().encode())]
        lines += [b"%s: %s" % header for header in self.headers if header[0] != b"upgrade"]
        self.parser = httptools.HttpRequestParser(self)
        self._bare_bytes = 0
        self.data_received(b"\r\n".join([*lines, b"", rest]))

    def _watch_closing(self) -> None:
        """Abort a connection that was closed and does not end, as its client takes nothing.

        Uvicorn closes in many places and may leave less in the buffer than pauses writing, so
        this looks twice in `stalled_seconds` instead of following each of them.
        """
        if self._was_closing:
            self.transport.abort()
            return
        self._was_closing = self.transport.is_closing()
        self._watch = self.loop.call_later(self._limits.stalled_seconds / 2, self._watch_closing)


class _UnchunkedCycle(RequestResponseCycle):
    """HTTP/1.0 knows no chunks: a body of unknown length ends with the connection."""

    _endless = False

    async def send(self, message: ASGISendEvent) -> None:
        if message["type"] == "http.response.start":
            names = {name.lower() for name, _ in message.get("headers", ())}
            self._endless = b"content-length" not in names
            if self._endless:
                self.chunked_encoding = False
        elif message["type"] == "http.response.body" and self._endless:
            self.expected_content_length = len(message.get("body", b""))
        await super().send(message)
