"""What orchestrators and monitoring ask: health, readiness, versions, metrics."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING

from fastapi.responses import JSONResponse, Response
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from synthia_vllm import __version__
from synthia_vllm.errors import EngineDead, Unavailable

if TYPE_CHECKING:
    from synthia_vllm.http.application import Application
    from synthia_vllm.http.state import ServerState


def attach(app: Application, state: ServerState) -> None:
    """Add the routes."""

    @app.get("/health")
    async def health() -> JSONResponse:
        """200 while the engine's processes run, else 503: for a liveness probe."""
        status: str = state.phase
        try:
            if status != "starting":
                state.engine.check()
        except EngineDead:
            status = "dead"
        alive = status in ("serving", "leaving", "draining")
        return JSONResponse({"status": status}, 200 if alive else 503)

    @app.get("/ready")
    async def ready() -> JSONResponse:
        """200 while new requests are taken, else 503: for a readiness probe."""
        return JSONResponse({"status": state.phase}, 200 if state.phase == "serving" else 503)

    @app.get("/version")
    async def version() -> dict[str, str]:
        """This server's version and those of what runs below it."""
        below: dict[str, str] = {}
        with suppress(Unavailable):
            below = dict(state.engine.model_info.versions)
        return {"version": __version__, **below}

    @app.get("/ping")
    @app.post("/ping", include_in_schema=False)
    async def ping() -> JSONResponse:
        """As `/health`, by the name that SageMaker asks for."""
        return await health()

    # Not `async`: of several processes it reads files.
    @app.get("/load")
    def load() -> dict[str, int]:
        """Requests for text that are being answered, as vLLM tells them."""
        return {"server_load": state.metrics.in_flight_of_all()}

    if state.settings.metrics == "off":
        return

    # Not `async`: collecting a few hundred series takes milliseconds, off the event loop.
    @app.get("/metrics")
    def prometheus() -> Response:
        """The edge's and vLLM's series, for Prometheus."""
        return Response(state.metrics.exposition(), media_type=CONTENT_TYPE_LATEST)
