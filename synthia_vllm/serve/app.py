"""The application: an engine, settings and metrics tied to the routes, and the engine's life."""

from __future__ import annotations

import asyncio
import logging
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING

from synthia_vllm import __version__
from synthia_vllm.api import (
    batches,
    chat,
    completions,
    messages,
    models,
    openapi,
    playground,
    probes,
    responses,
    tokenize,
    usage,
)
from synthia_vllm.http.application import Application
from synthia_vllm.http.gate import Gate, add_error_handlers
from synthia_vllm.http.state import ServerState

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from fastapi import FastAPI

    from synthia_vllm.admission.remote import AdmissionClient
    from synthia_vllm.engine.base import Engine
    from synthia_vllm.settings import Settings
    from synthia_vllm.telemetry.metrics import Metrics

logger = logging.getLogger(__name__)


def create_app(
    engine: Engine,
    settings: Settings,
    metrics: Metrics,
    *,
    admission: AdmissionClient | None = None,
    progress: Callable[[str], None] = logger.info,
    on_failure: Callable[[], None] = lambda: None,
    open_when_ready: bool = False,
) -> Application:
    """The application; its lifespan starts and stops `engine`.

    `admission` is that of several processes, where this is one of them. `on_failure` is called
    when the engine could not start or has died; ``app.server_state`` then knows why. With
    `open_when_ready` no connection is taken before requests are: others answer meanwhile.
    """
    state = ServerState(engine, settings, metrics, admission)

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        life = asyncio.create_task(state.run(progress, on_failure))
        idle = asyncio.create_task(runner.run()) if runner is not None else None
        if open_when_ready:
            await state.started.wait()
        try:
            yield
        finally:
            if idle is not None:
                idle.cancel()
                await asyncio.wait((idle,))
            life.cancel()
            with suppress(asyncio.CancelledError):
                await life
            await engine.close()
            await state.close()

    app = Application(
        state,
        title="synthia-vllm",
        version=__version__,
        description="Synthia-7B-v3.0 behind an OpenAI-compatible API.",
        lifespan=lifespan,
        redoc_url=None,
        redirect_slashes=False,  # a trailing slash is served, see `Gate`
    )
    chat.attach(app, state)
    responses.attach(app, state)
    completions.attach(app, state)
    messages.attach(app, state)
    tokenize.attach(app, state)
    runner = batches.attach(app, state)
    models.attach(app, state)
    usage.attach(app, state)
    probes.attach(app, state)
    if settings.page:
        playground.attach(app)
    openapi.attach(app)
    add_error_handlers(app, state)
    app.add_middleware(Gate, state=state)
    return app
