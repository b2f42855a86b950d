"""What hostile and broken clients meet, on real sockets, with uvicorn around small apps."""

from __future__ import annotations

import asyncio
import json
import logging
import socket
import struct
import threading
import time
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import pytest
import uvicorn

from synthia_vllm.http.connection import CONNECTION, ConnectionLimits, guarded

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from starlette.types import Receive, Scope, Send

    from synthia_vllm.errors import ApiError

LIMITS = ConnectionLimits(
    max_header_bytes=4096, max_connections=50, receive_seconds=30, stalled_seconds=30
)
SHORT = 0.4
GET = b"GET / HTTP/1.1\r\nhost: x\r\n\r\n"
CLOSE = b"GET / HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n"
SLOW_BODY = b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 9\r\n\r\nhalf"
START = {"type": "http.response.start", "status": 200, "headers": []}


@pytest.fixture(autouse=True)
def no_faults(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Nothing that a client does raises in the protocol; the event loop would log it."""
    yield
    assert not [record for record in caplog.get_records("call") if record.name == "asyncio"]


@dataclass
class App:
    """Notes each request that reaches it, and whether its client left."""

    requests: list[tuple[str, bytes]] = field(default_factory=list)
    began: threading.Event = field(default_factory=threading.Event)
    left: threading.Event = field(default_factory=threading.Event)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = await self.read(receive)
        if body is None:
            return
        self.requests.append((scope["path"], body))
        self.began.set()
        await self.answer(receive, send)

    async def read(self, receive: Receive) -> bytes | None:
        """The whole body, or nothing if the client left before its end."""
        body = b""
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                self.left.set()
                return None
            body += bytes(message["body"])
            if not message["more_body"]:
                return body

    async def answer(self, receive: Receive, send: Send) -> None:
        await respond(send, b"fine")


class Waiting(App):
    """Answers nothing until the client leaves."""

    async def answer(self, receive: Receive, send: Send) -> None:
        assert (await receive())["type"] == "http.disconnect"
        self.left.set()


class Told(App):
    """Answers nothing until it is told that the client left, which it asks for after `pause`."""

    pause = 0.0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.requests.append((scope["path"], await self.read(receive) or b""))
        self.began.set()
        await asyncio.sleep(self.pause)
        told = asyncio.Event()
        scope["extensions"][CONNECTION].on_left(told.set)
        await told.wait()
        self.left.set()


class ToldLate(Told):
    """Asks when the client may be gone."""

    pause = 0.3


class Streaming(App):
    """Streams without end, and looks at the same time whether the client is still there."""

    piece = b"token "
    pause = 0.01

    async def answer(self, receive: Receive, send: Send) -> None:
        watching = asyncio.ensure_future(receive())
        await send(START)
        while not watching.done():
            await send({"type": "http.response.body", "body": self.piece, "more_body": True})
            await asyncio.sleep(self.pause)
        assert watching.result()["type"] == "http.disconnect"
        self.left.set()


class Flooding(Streaming):
    """Streams much more than the sockets' buffers hold."""

    piece = bytes(1 << 20)
    pause = 0


class Gated(App):
    """Answers when it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = threading.Event()

    async def answer(self, receive: Receive, send: Send) -> None:
        await asyncio.to_thread(self.gate.wait, 20)
        await respond(send, b"fine")


class Sized(App):
    """Answers at once, before any body, with as many bytes as it is made for."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.began.set()
        await respond(send, bytes(self.size))


class Crashing(Sized):
    """Breaks down before the end of its response."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send(START)
        await send({"type": "http.response.body", "body": bytes(self.size), "more_body": True})
        self.began.set()
        raise ValueError


class Early(App):
    """Begins its response, then reads the request."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send(START)
        await send({"type": "http.response.body", "body": b"early", "more_body": True})
        self.began.set()
        await self.read(receive)


async def respond(send: Send, body: bytes) -> None:
    length = (b"content-length", b"%d" % len(body))
    await send({**START, "headers": [length]})
    await send({"type": "http.response.body", "body": body})


@dataclass
class Served:
    """A server, and how to reach it."""

    server: uvicorn.Server
    address: tuple[str, int]

    @contextmanager
    def client(self, *data: bytes, buffer: int | None = None) -> Iterator[socket.socket]:
        """A connection on which `data` has been sent; its buffer holds about `buffer` bytes."""
        with socket.socket() as client:
            if buffer is not None:
                client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
            client.settimeout(20)
            client.connect(self.address)
            for part in data:
                client.sendall(part)
            yield client

    def ask(self, *data: bytes) -> Reply:
        with self.client(*data) as client:
            return rest(client)

    @property
    def open_connections(self) -> int:
        return len(self.server.server_state.connections)


@dataclass
class Reply:
    """The first response in some bytes, and what follows it."""

    status: int
    headers: dict[str, str]
    body: bytes
    more: bytes

    @property
    def error(self) -> dict[str, Any]:
        assert self.headers["content-type"] == "application/json"
        assert self.headers["connection"] == "close"
        assert not self.more
        return dict(json.loads(self.body)["error"])


def parsed(raw: bytes) -> Reply:
    head, _, body = raw.partition(b"\r\n\r\n")
    first, *lines = head.decode().split("\r\n")
    headers = dict(line.split(": ", 1) for line in lines)
    length = int(headers.get("content-length", len(body)))
    return Reply(int(first.split()[1]), headers, body[:length], body[length:])


def rest(client: socket.socket) -> Reply:
    """All that comes until the server ends the connection, however it does."""
    raw = b""
    with suppress(ConnectionResetError):
        while part := client.recv(1 << 16):
            raw += part
    return parsed(raw)


def ended(client: socket.socket) -> bool:
    """Whether nothing comes but the connection's end."""
    try:
        return client.recv(1) == b""
    except ConnectionResetError:
        return True


def one(client: socket.socket, size: int = 1) -> Reply:
    """One response, with a body of at least `size`, on a connection that may stay open."""
    raw = b""
    while not (b"\r\n\r\n" in raw and len(parsed(raw).body) >= size):
        part = client.recv(1 << 16)
        assert part, raw
        raw += part
    return parsed(raw)


def half_close(client: socket.socket) -> None:
    client.shutdown(socket.SHUT_WR)


def reset(client: socket.socket) -> None:
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.close()


def push(client: socket.socket, piece: bytes, times: int) -> None:
    """Send `piece` again and again, as long as the server takes it."""
    with suppress(BrokenPipeError, ConnectionResetError):
        for _ in range(times):
            client.sendall(piece)


def holds(condition: Callable[[], object]) -> bool:
    """Whether `condition` comes to hold."""
    deadline = time.monotonic() + 20
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


@contextmanager
def serving(
    app: App,
    *,
    keep_alive: float = 30,
    send_buffer: int | None = None,
    on_error: Callable[[ApiError], None] = lambda _error: None,
    **changes: Any,
) -> Iterator[Served]:
    """Serve `app` with `LIMITS` and `changes`."""
    config = uvicorn.Config(
        app,
        http=guarded(replace(LIMITS, **changes), on_error=on_error),
        loop="uvloop",
        lifespan="off",
        log_config=None,
        access_log=False,
        timeout_keep_alive=keep_alive,  # type: ignore[arg-type]  # seconds, of which some is enough
        timeout_graceful_shutdown=1,
    )
    server = uvicorn.Server(config)
    with socket.socket() as listener:
        if send_buffer is not None:  # what is accepted inherits it
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)
        listener.bind(("127.0.0.1", 0))
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        try:
            assert holds(lambda: server.started)
            yield Served(server, listener.getsockname())
        finally:
            server.should_exit = True
            thread.join(30)
            assert not thread.is_alive()


@pytest.mark.parametrize(
    "sent",
    [
        pytest.param(b"", id="nothing"),
        pytest.param(b"\r\n", id="a line break"),
        pytest.param(b"POST / HT", id="half a request line"),
        pytest.param(b"GET / HTTP/1.1\r\nhost: x\r\na: b", id="half a head"),
        pytest.param(SLOW_BODY, id="half a body"),
    ],
)
def test_request_must_come_in_in_time(sent: bytes) -> None:
    """A request that is not complete in time gets 408, and its connection ends."""
    app = App()
    with serving(app, receive_seconds=SHORT) as served:
        reply = served.ask(sent)
        assert reply.status == 408
        assert reply.error["type"] == "invalid_request_error"
        assert reply.error["code"] == "request_timeout"
        assert reply.error["param"] is None
        assert f"{SHORT:g} seconds" in reply.error["message"]
        assert holds(lambda: served.open_connections == 0)
        assert not app.requests
        assert app.left.is_set() == (sent == SLOW_BODY)


def test_bytes_do_not_stretch_the_time() -> None:
    """One byte now and then, and a client that neither reads nor hangs up, gain nothing."""
    with serving(App(), receive_seconds=SHORT) as served, served.client() as client:
        for byte in b"GET / HTTP/1.1\r\nx: " + b"y" * 400:
            try:
                client.send(bytes([byte]))
            except (BrokenPipeError, ConnectionResetError):
                break
            time.sleep(0.02)
        else:
            pytest.fail("the connection did not end")
        assert holds(lambda: served.open_connections == 0)


def test_each_request_has_its_own_time() -> None:
    """On a connection that is kept, the time counts from the next request's first byte."""
    with serving(App(), receive_seconds=1) as served, served.client() as client:
        for _ in range(3):
            client.sendall(GET)
            assert one(client).status == 200
            time.sleep(0.5)
        client.sendall(GET[:10])
        reply = rest(client)
        assert reply.error["code"] == "request_timeout"


def test_time_of_the_answer_is_not_counted() -> None:
    """Once a request is complete, its answer may take longer than it."""
    app = Gated()
    with serving(app, receive_seconds=1) as served, served.client(GET) as client:
        time.sleep(2)
        app.gate.set()
        assert one(client).body == b"fine"


def test_time_out_after_the_response_began() -> None:
    """A late request whose response has begun gets no second one; the app is told."""
    app = Early()
    with serving(app, receive_seconds=SHORT) as served:
        reply = served.ask(SLOW_BODY)
        assert reply.status == 200
        assert b"early" in reply.body
        assert b"408" not in reply.body
        assert app.left.wait(20)


def test_time_out_while_the_app_does_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """A client whose body nobody reads gets its 408; then reading goes on until it leaves."""
    monkeypatch.setattr("synthia_vllm.http.connection._LINGER_SECONDS", 60)

    class Deaf(App):
        async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
            await asyncio.sleep(60)

    with serving(Deaf(), receive_seconds=SHORT) as served:
        head = b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 400000\r\n\r\n"
        assert served.ask(head, bytes(300_000)).error["code"] == "request_timeout"
        assert holds(lambda: served.open_connections == 0)


def test_idle_connection_ends_by_uvicorns_time() -> None:
    """Between requests uvicorn's keep-alive timeout holds; no byte but a request's stops it."""
    with serving(App(), keep_alive=SHORT) as served, served.client(GET) as client:
        assert one(client).status == 200
        client.sendall(b"\r\n")
        assert ended(client)


def test_request_stops_the_keep_alive_time() -> None:
    """A request that has begun is not cut off by the time that a connection may be idle."""
    with serving(App(), keep_alive=1) as served, served.client(GET) as client:
        assert one(client).status == 200
        client.sendall(GET[:10])
        time.sleep(2)
        client.sendall(GET[10:])
        assert one(client).status == 200


def test_early_answer_leaves_no_connection_behind() -> None:
    """A body that comes in after its response does not stop the keep-alive timeout."""
    with serving(Sized(4), keep_alive=SHORT) as served, served.client(SLOW_BODY) as client:
        assert one(client).status == 200
        client.sendall(b"after")
        assert ended(client)


def test_early_answer_keeps_the_connection() -> None:
    """After a body that nobody wanted, the next request is answered; even from one segment."""
    with serving(Sized(4)) as served, served.client(SLOW_BODY) as client:
        assert one(client).status == 200
        client.sendall(b"after" + GET)
        assert one(client).status == 200


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b"GET /" + b"a" * 5000 + b" HTTP/1.1\r\n\r\n", id="url"),
        pytest.param(b"GET / HTTP/1.1\r\na: " + b"b" * 5000 + b"\r\n\r\n", id="one header"),
        pytest.param(b"GET / HTTP/1.1\r\n" + b"a: b\r\n" * 900 + b"\r\n", id="many headers"),
        pytest.param(
            b"POST / HTTP/1.1\r\ncontent-length: 9\r\na: " + b"b" * 5000 + b"\r\n\r\n123456789",
            id="with its body",
        ),
    ],
)
@pytest.mark.parametrize("pieces", [1, 7])
def test_large_head_is_refused(data: bytes, pieces: int) -> None:
    """A head above the limit gets 431, however it is cut, and no app sees it."""
    app = App()
    size = len(data) // pieces + 1
    with serving(app) as served, served.client() as client:
        for start in range(0, len(data), size):
            push(client, data[start : start + size], 1)
            time.sleep(0.01)
        reply = rest(client)
        assert reply.status == 431
        assert reply.error["code"] == "headers_too_large"
        assert "4096 bytes" in reply.error["message"]
        assert not app.requests


@pytest.mark.parametrize(
    "begin",
    [
        pytest.param(b"GET /", id="url"),
        pytest.param(b"GET / HTTP/1.1\r\na", id="header name"),
        pytest.param(b"GET / HTTP/1.1\r\na: b", id="header"),
        pytest.param(
            b"POST / HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\n0\r\na: b", id="trailer"
        ),
        pytest.param(
            b"POST / HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\n1;x=", id="chunk extension"
        ),
    ],
)
def test_endless_head_is_cut(begin: bytes) -> None:
    """What never ends is refused by its size, long before its time, and not read on and on."""
    with serving(App()) as served, served.client(begin) as client:
        client.sendall(b"x" * 5000)
        assert rest(client).error["code"] == "headers_too_large"
        push(client, b"x" * 65536, 1000)
        assert holds(lambda: served.open_connections == 0)


def test_body_is_not_counted_as_head() -> None:
    """A small head and a large body in one segment, or in chunks, are fine; so are many."""
    app = App()
    plain = b"POST /plain HTTP/1.1\r\ncontent-length: 60000\r\n\r\n" + bytes(60_000)
    chunked = b"POST /chunked HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\n"
    chunked += b"2\r\nab\r\n" * 5000 + b"0\r\n\r\n"
    with serving(app) as served, served.client() as client:
        for data in (plain, chunked) * 3:
            client.sendall(data)
            assert one(client).status == 200
    assert app.requests == [("/plain", bytes(60_000)), ("/chunked", b"ab" * 5000)] * 3


def test_head_within_the_limit_passes() -> None:
    """The limit is not reached before it is; each request of a connection counts alone."""
    app = App()
    data = b"GET / HTTP/1.1\r\na: " + b"b" * 3900 + b"\r\n\r\n"
    with serving(app) as served, served.client() as client:
        for _ in range(3):
            client.sendall(data[:2000])
            time.sleep(0.02)
            client.sendall(data[2000:])
            assert one(client).status == 200


def test_too_many_connections() -> None:
    """One connection too many gets 503 at once and takes no place; a free place is used again."""
    with serving(App(), max_connections=2) as served, served.client() as first:
        with served.client():
            assert holds(lambda: served.open_connections == 2)
            for _ in range(5):
                reply = served.ask()
                assert reply.status == 503
                assert reply.error["type"] == "overloaded_error"
                assert reply.error["code"] == "too_many_connections"
                assert reply.headers["retry-after"] == "1"
                assert served.open_connections == 2
        assert holds(lambda: served.open_connections == 1)
        assert served.ask(CLOSE).status == 200
        first.sendall(GET)
        assert one(first).status == 200


def test_an_idle_connection_gives_way() -> None:
    """Kept-alive connections that wait for a next request lock nobody out."""
    with (
        serving(App(), max_connections=2) as served,
        served.client(GET) as first,
        served.client(GET) as second,
    ):
        assert one(first).status == one(second).status == 200
        for _ in range(3):
            assert served.ask(CLOSE).status == 200
        assert holds(lambda: served.open_connections == 1)


def test_what_is_told_here_is_counted() -> None:
    """Each error that the protocol answers itself is told to `on_error`, with its request's id."""
    told: list[str | None] = []
    with serving(App(), on_error=lambda error: told.append(error.code)) as served:
        for data in (b"nonsense\r\n\r\n", GET[:-2] + b"x: " + b"y" * 5000):
            assert served.ask(data).headers["x-request-id"]
    assert told == ["invalid_http", "headers_too_large"]


def test_http_1_0_is_not_chunked() -> None:
    """A client that knows no chunks gets the bare body, and its end by the connection's."""

    class Parts(App):
        async def answer(self, receive: Receive, send: Send) -> None:
            await send(START)
            for part in (b"one ", b"two ", b""):
                more = {"body": part, "more_body": bool(part)}
                await send({"type": "http.response.body", **more})

    old = b"GET / HTTP/1.0\r\nconnection: keep-alive\r\n\r\n"
    with serving(Parts()) as served:
        reply = served.ask(old)
        assert reply.body == b"one two "
        assert "transfer-encoding" not in reply.headers
        assert reply.headers["connection"] == "close"
    with serving(App()) as served:
        assert served.ask(old).body == b"fine"


def test_a_request_that_has_come_keeps_its_connection() -> None:
    """A loop that stood still past the idle time reads what came meanwhile before it closes."""

    class Halting(App):
        async def answer(self, receive: Receive, send: Send) -> None:
            await respond(send, b"fine")
            if len(self.requests) == 1:
                asyncio.get_running_loop().call_later(0.05, time.sleep, 0.6)

    app = Halting()
    with serving(app, keep_alive=0.3) as served, served.client(GET) as client:
        assert one(client).status == 200
        time.sleep(0.2)  # the loop stands still, until after the idle time is over
        client.sendall(GET)
        assert one(client).status == 200
        assert ended(client)  # idle now


def test_refused_client_can_read_why(monkeypatch: pytest.MonkeyPatch) -> None:
    """A client may send its request before it reads that it is refused, and gets no reset."""
    monkeypatch.setattr("synthia_vllm.http.connection._LINGER_SECONDS", 20)
    with serving(App(), max_connections=0) as served, served.client() as client:
        for _ in range(3):
            client.sendall(GET)
            time.sleep(0.05)
        assert rest(client).status == 503


def test_refused_client_does_not_stay() -> None:
    """A refused client that does not hang up is cut off."""
    with serving(App(), max_connections=0) as served, served.client() as client:
        assert rest(client).status == 503
        assert holds(lambda: gone(client))


def gone(client: socket.socket) -> bool:
    """Whether the other side's socket does not exist any more."""
    try:
        client.sendall(b"x")
    except (BrokenPipeError, ConnectionResetError):
        return True
    return False


def test_stalled_reader_is_dropped() -> None:
    """A client that stops reading in the middle of a stream is dropped; its app is told."""
    app = Flooding()
    with serving(app, stalled_seconds=SHORT) as served, served.client(GET, buffer=4096):
        assert app.began.wait(20)
        assert app.left.wait(20)
        assert holds(lambda: served.open_connections == 0)


def test_slow_reader_is_not_dropped() -> None:
    """A client that pauses, but takes what waits for it in time, gets all of it, and the next."""
    with (
        serving(Sized(1_000_000), stalled_seconds=3, send_buffer=65536) as served,
        served.client(GET, buffer=65536) as client,
    ):
        time.sleep(0.5)
        body = one(client, 1_000_000).body
        assert len(body) == 1_000_000
        time.sleep(4)
        client.sendall(CLOSE)
        assert len(rest(client).body) == 1_000_000


@pytest.mark.parametrize(
    "app",
    [
        pytest.param(Sized(20_000_000), id="a full buffer"),
        pytest.param(Sized(60_000), id="less than pauses writing"),
        pytest.param(Crashing(60_000), id="less than pauses writing, and a crash"),
    ],
)
@pytest.mark.parametrize("request_", [GET, CLOSE], ids=["kept", "closed"])
def test_stalled_reader_of_the_end(app: App, request_: bytes) -> None:
    """A client that does not take the end of its response does not keep the connection."""
    with (
        serving(app, stalled_seconds=SHORT, keep_alive=SHORT, send_buffer=4096) as served,
        served.client(request_, buffer=4096),
    ):
        assert app.began.wait(20)
        assert holds(lambda: served.open_connections == 0)


@pytest.mark.parametrize(
    "data",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",  # TLS on the plain port
        b"nonsense\r\n\r\n",
        b"GET http:// HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\na b: c\r\n\r\n",
        b"POST / HTTP/1.1\r\ncontent-length: x\r\n\r\n",
        b"POST / HTTP/1.1\r\ncontent-length: 1\r\ntransfer-encoding: chunked\r\n\r\n",
        b"CONNECT example.com:443 HTTP/1.1\r\nhost: example.com\r\n\r\n",
    ],
)
def test_malformed_request(data: bytes, caplog: pytest.LogCaptureFixture) -> None:
    """What is no HTTP gets 400 in the envelope, and no line in the log."""
    app = App()
    with serving(app) as served:
        caplog.clear()
        with caplog.at_level(logging.INFO):
            reply = served.ask(data)
        assert reply.status == 400
        assert reply.error["type"] == "invalid_request_error"
        assert reply.error["code"] == "invalid_http"
        assert "date" in reply.headers
        assert not caplog.records
        assert not app.requests


def test_malformed_body() -> None:
    """A body that breaks off into nonsense ends its request; the app waiting for it is told."""
    app = App()
    head = b"POST / HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\n4\r\nhalf\r\n"
    with serving(app) as served, served.client(head) as client:
        time.sleep(0.1)
        client.sendall(b"nonsense\r\n")
        assert rest(client).error["code"] == "invalid_http"
        assert app.left.wait(20)


@pytest.mark.parametrize("offer", [b"websocket", b"h2c"])
@pytest.mark.parametrize("cut", [0, 5])
def test_upgrade_is_plain_http(offer: bytes, cut: int, caplog: pytest.LogCaptureFixture) -> None:
    """An offer to upgrade is passed over: the request is read, once, with its body."""
    app = App()
    head = b"%s /up HTTP/1.1\r\nhost: x\r\nconnection: Upgrade, %s\r\nupgrade: %s\r\n"
    post = head % (b"POST", b"HTTP2-Settings", offer)
    post += b"content-length: 9\r\nx: " + b"y" * 3000 + b"\r\n\r\n"
    with serving(app) as served, served.client() as client:
        caplog.clear()
        with caplog.at_level(logging.INFO):
            for _ in range(2):
                client.sendall(post + b"some body"[:cut])
                time.sleep(0.05)
                client.sendall(b"some body"[cut:])
                assert one(client).status == 200
            client.sendall(head % (b"GET", b"close", offer) + b"\r\n")
            assert rest(client).headers["connection"] == "close"
        assert not caplog.records
        assert holds(lambda: not served.server.server_state.tasks)
    assert app.requests == [("/up", b"some body")] * 2 + [("/up", b"")]


@pytest.mark.parametrize("together", [True, False], ids=["in one segment", "later"])
@pytest.mark.parametrize("more", [GET, b"nonsense\r\n\r\n"], ids=["a request", "nonsense"])
def test_pipelined_request_is_not_started(more: bytes, together: bool) -> None:
    """What comes before the answer is dropped: that answer is whole and the connection's last."""
    app = Gated()
    parts = (GET + more,) if together else (GET, more)
    with serving(app) as served, served.client(parts[0]) as client:
        assert app.began.wait(20)
        for part in parts[1:]:
            client.sendall(part)
        time.sleep(0.1)
        app.gate.set()
        reply = rest(client)
        assert (reply.status, reply.body, reply.more) == (200, b"fine", b"")
        assert reply.headers["connection"] == "close"
    assert len(app.requests) == 1


@pytest.mark.parametrize("leave", [half_close, socket.socket.close, reset])
@pytest.mark.parametrize("pipelined", [b"", GET, GET + bytes(100_000)], ids=["no", "one", "much"])
@pytest.mark.parametrize("app_type", [Waiting, Streaming, Told, ToldLate])
def test_leaving_is_noticed(
    app_type: type[App], pipelined: bytes, leave: Callable[[socket.socket], None]
) -> None:
    """However a client leaves, pipelining or not, the app is told while it works."""
    app = app_type()
    with serving(app) as served, served.client(GET + pipelined) as client:
        assert app.began.wait(20)
        assert not app.left.is_set()
        leave(client)
        assert app.left.wait(20)
        assert holds(lambda: served.open_connections == 0)
    assert len(app.requests) == 1


def test_leaving_is_noticed_behind_a_full_buffer() -> None:
    """A half-close is the client's leaving also when it has not read what was written."""

    class Mute(App):
        async def answer(self, receive: Receive, send: Send) -> None:
            await send(START)
            await send({"type": "http.response.body", "body": bytes(1 << 24), "more_body": True})
            assert (await receive())["type"] == "http.disconnect"
            self.left.set()

    app = Mute()
    with serving(app) as served, served.client(GET, buffer=4096) as client:
        assert app.began.wait(20)
        time.sleep(0.1)
        client.shutdown(socket.SHUT_WR)
        assert app.left.wait(20)


def test_surplus_is_bounded() -> None:
    """A client that sends on and on behind its request is cut off; its app is told."""
    app = Waiting()
    with serving(app) as served, served.client(GET) as client:
        assert app.began.wait(20)
        push(client, bytes(65536), 1000)
        assert app.left.wait(20)
        assert holds(lambda: served.open_connections == 0)


def test_expect_continue() -> None:
    """The body is asked for when the app wants it, and a refused request is not asked for one."""
    app = App()
    head = b"POST / HTTP/1.1\r\nhost: x\r\nexpect: 100-continue\r\ncontent-length: 4\r\n\r\n"
    with serving(app) as served, served.client(head) as client:
        assert client.recv(100) == b"HTTP/1.1 100 Continue\r\n\r\n"
        client.sendall(b"body")
        assert one(client).status == 200
    assert app.requests == [("/", b"body")]

    class Late(App):
        async def read(self, receive: Receive) -> bytes | None:
            await asyncio.sleep(3 * SHORT)  # by then the time for the request is over
            return await super().read(receive)

    late = Late()
    with serving(late, receive_seconds=SHORT) as served, served.client(head) as client:
        assert rest(client).error["code"] == "request_timeout"
        assert late.left.wait(20)
