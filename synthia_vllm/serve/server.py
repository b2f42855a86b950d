"""The server process: uvicorn around the application, from start to drained stop."""

from __future__ import annotations

import socket
import time
from typing import TYPE_CHECKING

import uvicorn

from synthia_vllm.errors import StartupError
from synthia_vllm.http.connection import ConnectionLimits, guarded

if TYPE_CHECKING:
    from types import FrameType

    from synthia_vllm.http.application import Application
    from synthia_vllm.settings import Settings

# After the time to finish is over, the seconds that last words and closing get.
_LAST_WORDS_SECONDS = 2


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens there. Raises `StartupError` if the address cannot be had."""
    try:
        [(family, _, _, _, address), *_] = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
        return socket.create_server(address[:2], family=family)
    except OSError as error:
        raise StartupError(
            f"Cannot listen on {host}:{port}: {error.strerror or error}. If another server is "
            "running there, `--port` chooses another port."
        ) from error


class Server(uvicorn.Server):
    """Uvicorn that leaves and drains: a first SIGTERM or Ctrl-C lets running answers finish.

    While leaving, new requests are served, and each answer closes its connection; `/ready` says
    503, so that load balancers send no more. While draining, the port stays open so that `/ready`
    and new requests are answered with 503 instead of a refused connection. When the time to finish
    is over, what still runs ends with an error. A second signal stops at once: `forced_exit` is
    then true, and nothing was closed.
    """

    def __init__(self, app: Application, settings: Settings) -> None:
        state = app.server_state
        limits = settings.limits
        guard = guarded(
            ConnectionLimits(
                max_header_bytes=limits.max_header_bytes,
                max_connections=limits.max_connections,
                receive_seconds=limits.receive_seconds,
                stalled_seconds=limits.stalled_seconds,
                max_upload_bytes=settings.batches.max_file_bytes
                if settings.batches.directory is not None
                else 0,
            ),
            leaving=lambda: state.phase == "leaving",
            on_error=lambda error: state.count_error(error, "other"),
        )
        super().__init__(
            uvicorn.Config(
                app,
                host=settings.host,
                port=settings.port,
                loop="uvloop",
                http=guard,
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,  # nothing here asks for the client's address
                timeout_keep_alive=settings.keepalive_seconds,  # type: ignore[arg-type]  # a delay
                timeout_graceful_shutdown=_LAST_WORDS_SECONDS,
            )
        )
        self._state = state
        self._delay = settings.shutdown_delay_seconds
        self._grace = settings.shutdown_grace_seconds
        self._deadline: float | None = None  # of the phase, once told to stop
        self.forced_exit = False

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._deadline is not None:
            self.forced_exit = self.force_exit = self.should_exit = True
        elif self._state.phase in ("starting", "dead"):
            self._deadline = time.monotonic()
            self.should_exit = True
        else:
            if self._delay:
                self._state.leave()
            else:
                self._state.drain()
            self._deadline = time.monotonic() + (self._delay or self._grace)

    async def on_tick(self, counter: int) -> bool:
        if self._deadline is not None:
            over = time.monotonic() > self._deadline
            if self._state.phase == "leaving" and over:
                self._state.drain()
                self._deadline += self._grace
            elif self._state.phase == "draining":
                if over:
                    self._state.end_all()
                if self._state.in_flight == 0 or over:
                    self.should_exit = True
        return await super().on_tick(counter)
