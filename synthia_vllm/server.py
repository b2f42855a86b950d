"""The server process: uvicorn around the application, from start to drained stop."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import uvicorn

if TYPE_CHECKING:
    from types import FrameType

    from fastapi import FastAPI

    from synthia_vllm.service import Service
    from synthia_vllm.settings import Settings


class Server(uvicorn.Server):
    """Uvicorn that drains: a first SIGTERM or Ctrl-C lets running answers finish.

    While draining, the port stays open so that `/ready` and new requests are answered with 503
    instead of a refused connection. A second signal stops at once.
    """

    def __init__(self, app: FastAPI, settings: Settings) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                host=settings.host,
                port=settings.port,
                loop="uvloop",
                http="httptools",
                log_config=None,
                access_log=False,
                server_header=False,
                timeout_graceful_shutdown=2,
            )
        )
        self._service: Service = app.state.service
        self._grace = settings.shutdown_grace_seconds
        self._deadline: float | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._deadline is not None or self._service.phase in ("starting", "dead"):
            super().handle_exit(sig, frame)
            return
        self._service.phase = "draining"
        self._deadline = time.monotonic() + self._grace

    async def on_tick(self, counter: int) -> bool:
        if self._deadline is not None and (
            self._service.in_flight == 0 or time.monotonic() > self._deadline
        ):
            self.should_exit = True
        return await super().on_tick(counter)
