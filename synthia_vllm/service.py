"""What the routes share: the engine, and how far it is in its life."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Literal

from synthia_vllm.errors import EngineDead, StartupError, Unavailable

if TYPE_CHECKING:
    from collections.abc import Callable

    from synthia_vllm.engine import Engine
    from synthia_vllm.metrics import Metrics
    from synthia_vllm.settings import Settings

Phase = Literal["starting", "serving", "draining", "dead"]


class Service:
    """One engine, its settings and metrics, and the phase it is in."""

    def __init__(self, engine: Engine, settings: Settings, metrics: Metrics) -> None:
        self.engine = engine
        self.settings = settings
        self.metrics = metrics
        self.phase: Phase = "starting"
        self.failure: StartupError | EngineDead | None = None
        self.in_flight = 0
        self.created = int(time.time())

    def require_serving(self) -> None:
        """Raise if requests cannot be taken now."""
        if self.phase == "serving":
            return
        if self.phase == "dead":
            raise EngineDead
        raise Unavailable(
            "The server is starting; it takes requests when /ready says so."
            if self.phase == "starting"
            else "The server is shutting down and takes no new requests.",
            code=self.phase,
        )

    async def run(self, progress: Callable[[str], None], on_failure: Callable[[], None]) -> None:
        """Start the engine, then watch it until this task is cancelled."""
        try:
            await self.engine.start(progress)
            self.phase = "serving"
            host, port = self.settings.host, self.settings.port
            progress(f"ready: {', '.join(self.settings.served)} at http://{host}:{port}/v1")
            while True:
                self.engine.check()
                await asyncio.sleep(0.25)
        except (StartupError, EngineDead) as error:
            if self.phase == "draining":  # Ctrl-C reaches the engine's processes too
                return
            self.phase = "dead"
            self.failure = error
            on_failure()
