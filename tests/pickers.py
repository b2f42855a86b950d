"""An endpoint picker as a gateway sees it: Envoy's ext_proc over gRPC, as llm-d's picker speaks it.

The few messages it takes are put together by hand: their packages are not Python's.
"""

from __future__ import annotations

import subprocess
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import grpc

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

# In one message, as llm-d's: gRPC and Envoy have bounds for them.
_CHUNK = 62_000


class Picker:
    """Says where each request goes; with TLS and a certificate of its own, as llm-d's does."""

    def __init__(self, place: Path, port: int, pick: Callable[[bytes], str]) -> None:
        self.pick = pick
        """The address of the server that a request with this body is for."""
        self.asked = 0
        self.hangs = False
        self._going = threading.Event()
        self._server = grpc.server(ThreadPoolExecutor(32))
        process = grpc.stream_stream_rpc_method_handler(self._process)
        check = grpc.unary_unary_rpc_method_handler(lambda _request, _context: b"\x08\x01")
        self._server.add_generic_rpc_handlers(
            (
                grpc.method_handlers_generic_handler(
                    "envoy.service.ext_proc.v3.ExternalProcessor", {"Process": process}
                ),
                grpc.method_handlers_generic_handler("grpc.health.v1.Health", {"Check": check}),
            )
        )
        credentials = grpc.ssl_server_credentials([_certificate(place)])
        assert self._server.add_secure_port(f"127.0.0.1:{port}", credentials) == port
        self._server.start()

    def stop(self) -> None:
        """As when it is killed: what it has is broken off."""
        self._going.set()
        self._server.stop(None).wait()

    def _process(self, messages: Iterator[bytes], context: Any) -> Iterator[bytes]:
        body = b""
        for message in messages:
            for number, value in _fields(message):
                if number == 4:  # request_body
                    part = dict(_fields(value))
                    body += part.get(1, b"")
                    if part.get(2):  # end_of_stream
                        self.asked += 1
                        if self.hangs:
                            self._going.wait()
                            context.abort(grpc.StatusCode.UNAVAILABLE, "stopped")
                        yield from _sent_to(self.pick(body), body)


def _sent_to(endpoint: str, body: bytes) -> Iterator[bytes]:
    """First the headers, one more of them, then the whole body again."""
    header = _field(1, b"x-gateway-destination-endpoint") + _field(3, endpoint.encode())
    mutation = _field(1, _field(1, header))
    common = _field(2, mutation) + b"\x28\x01"  # clear_route_cache
    yield _field(1, _field(1, common))
    for start in range(0, len(body), _CHUNK):
        part = _field(1, body[start : start + _CHUNK])
        if start + _CHUNK >= len(body):
            part += b"\x10\x01"  # end_of_stream
        yield _field(3, _field(1, _field(3, _field(3, part))))


def _certificate(place: Path) -> tuple[bytes, bytes]:
    """A key, and a certificate that nobody but itself vouches for."""
    key, certificate = place / "key.pem", place / "certificate.pem"
    if not key.exists():
        command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2"
        files = ["-keyout", str(key), "-out", str(certificate), "-subj", "/O=Picker"]
        subprocess.run([*command.split(), *files], check=True, capture_output=True)
    return key.read_bytes(), certificate.read_bytes()


def _varint(number: int) -> bytes:
    out = b""
    while number > 127:
        out += bytes([number & 127 | 128])
        number >>= 7
    return out + bytes([number])


def _field(number: int, value: bytes) -> bytes:
    """A field of bytes, text or a message."""
    return _varint(number << 3 | 2) + _varint(len(value)) + value


def _fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """The fields of a message: numbers, and bytes."""
    at = 0

    def varint() -> int:
        nonlocal at
        number = shift = 0
        while True:
            byte = message[at]
            at += 1
            number |= (byte & 127) << shift
            if byte < 128:
                return number
            shift += 7

    while at < len(message):
        tag = varint()
        if tag & 7 == 0:
            yield tag >> 3, varint()
        elif tag & 7 == 2:
            size = varint()
            yield tag >> 3, message[at : at + size]
            at += size
        else:
            at += {1: 8, 5: 4}[tag & 7]
