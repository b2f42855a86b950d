"""The HTTP edge: routes, errors, and the life of the engine behind them.

`create_app` ties an engine, settings and metrics to a FastAPI application. The routes for text are
raw ASGI endpoints (`http/handler.py`); the others are ordinary FastAPI routes.
"""

from __future__ import annotations

import asyncio
import logging
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING, Any, Final, Literal

from fastapi import FastAPI
from fastapi.responses import JSONResponse, Response
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.requests import Request  # noqa: TC002  # FastAPI reads the routes' annotations
from starlette.routing import Route

from synthia_vllm import __version__
from synthia_vllm.admission.tenants import ANONYMOUS
from synthia_vllm.api.completions.protocol import (
    Completion,
    CompletionRequest,
    DetokenizeRequest,
    RenderedPrompt,
    Text,
    TokenizeRequest,
    Tokens,
)
from synthia_vllm.api.playground import add_page
from synthia_vllm.api.tokenize.serving import add_workbench
from synthia_vllm.errors import (
    ApiError,
    EngineDead,
    EngineFault,
    NoSuchRoute,
    Unavailable,
    UnknownModel,
)
from synthia_vllm.generate.protocol import ChatCompletion, ChatRequest, ModelCard, ModelList
from synthia_vllm.http.endpoint import CHAT, COMPLETIONS, ROUTES
from synthia_vllm.http.errors import error_response, request_id
from synthia_vllm.http.handler import Endpoint
from synthia_vllm.http.state import Service

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from pydantic import BaseModel
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from synthia_vllm.admission.remote import SharedTenants
    from synthia_vllm.engine.base import Engine
    from synthia_vllm.settings import Settings
    from synthia_vllm.telemetry.metrics import Metrics

logger = logging.getLogger(__name__)


def create_app(
    engine: Engine,
    settings: Settings,
    metrics: Metrics,
    *,
    tenants: SharedTenants | None = None,
    progress: Callable[[str], None] = logger.info,
    on_failure: Callable[[], None] = lambda: None,
) -> FastAPI:
    """The application; its lifespan starts and stops `engine`.

    `tenants` are those of several processes, where this is one of them. `on_failure` is called
    when the engine could not start or has died; ``app.state.service`` then knows why.
    """
    service = Service(engine, settings, metrics, tenants)

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        life = asyncio.create_task(service.run(progress, on_failure))
        try:
            yield
        finally:
            life.cancel()
            with suppress(asyncio.CancelledError):
                await life
            await engine.close()
            service.close()

    app = _App(
        title="synthia-vllm",
        version=__version__,
        description="Synthia-7B-v3.0 behind an OpenAI-compatible API.",
        lifespan=lifespan,
        redoc_url=None,
        redirect_slashes=False,  # a trailing slash is served, see `_Gate`
    )
    app.state.service = service
    app.endpoints = {route.path: Endpoint(service, route) for route in ROUTES}
    for path, endpoint in app.endpoints.items():
        app.router.routes.append(Route(path, endpoint, methods=["POST"]))
    _add_plain_routes(app, service)
    add_workbench(app, service)
    if settings.page:
        add_page(app)
    _add_error_answers(app, service)
    _describe_bodies(app)
    app.add_middleware(_Gate, service=service)
    return app


class _App(FastAPI):
    """FastAPI, but for the routes that carry every token: their requests pass nothing else."""

    endpoints: dict[str, Endpoint]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["method"] == "POST":
            endpoint = self.endpoints.get(scope["path"].rstrip("/"))
            if endpoint is not None:
                await endpoint(scope, receive, send)
                return
        await super().__call__(scope, receive, send)


def _add_plain_routes(app: FastAPI, service: Service) -> None:
    settings = service.settings

    def card(name: str) -> ModelCard:
        try:
            context = service.engine.traits.max_model_len
        except Unavailable:
            context = None
        return ModelCard(
            id=name,
            created=service.created,
            owned_by="synthia-vllm",
            root=settings.resolved_model,
            max_model_len=context,
        )

    def names_for(request: Request) -> list[str]:
        """The served names that this request's user may use."""
        allowed = service.tenants.models_of(request.state.user)
        return [name for name in settings.served if allowed is None or name in allowed]

    @app.get("/v1/models")
    async def models(request: Request) -> ModelList:
        """The models you may use; each preset is a name of its own."""
        return ModelList(data=[card(name) for name in names_for(request)])

    @app.get("/v1/models/{name:path}")
    async def model(name: str, request: Request) -> ModelCard:
        """One model."""
        if name not in names_for(request):
            raise UnknownModel(name, tuple(names_for(request)))
        return card(name)

    @app.get("/health")
    async def health() -> JSONResponse:
        """200 while the engine's processes run, else 503: for a liveness probe."""
        status: str = service.phase
        try:
            if status != "starting":
                service.engine.check()
        except EngineDead:
            status = "dead"
        alive = status in ("serving", "leaving", "draining")
        return JSONResponse({"status": status}, 200 if alive else 503)

    @app.get("/ready")
    async def ready() -> JSONResponse:
        """200 while new requests are taken, else 503: for a readiness probe."""
        return JSONResponse({"status": service.phase}, 200 if service.phase == "serving" else 503)

    @app.get("/version")
    async def version() -> dict[str, str]:
        """This server's version and those of what runs below it."""
        below: dict[str, str] = {}
        with suppress(Unavailable):
            below = dict(service.engine.traits.versions)
        return {"version": __version__, **below}

    if settings.metrics == "off":
        return

    # Not `async`: collecting a few hundred series takes milliseconds, off the event loop.
    @app.get("/metrics")
    def prometheus() -> Response:
        """The edge's and vLLM's series, for Prometheus."""
        return Response(service.metrics.exposition(), media_type=CONTENT_TYPE_LATEST)


def _add_error_answers(app: FastAPI, service: Service) -> None:
    def told(request: Request, error: ApiError) -> Response:
        """`error` as a response, counted."""
        service.count_error(error, _route_of(request.scope))
        return _response(error, request.scope)

    @app.exception_handler(ApiError)
    async def api_error(request: Request, error: ApiError) -> Response:
        return told(request, error)

    @app.exception_handler(Exception)
    async def fault(request: Request, _error: Exception) -> Response:
        """A fault of the server's own; Starlette logs it."""
        return told(request, EngineFault())

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> Response:
        """No such route, or not with this method."""
        said = told(request, NoSuchRoute(error.status_code, request.method, request.url.path))
        said.headers.update(error.headers or {})
        return said


def _response(error: ApiError, scope: Scope) -> Response:
    status, headers, body = error_response(error, request_id(dict(scope["headers"])))
    response = Response(body, status)
    response.raw_headers = headers
    return response


def _route_of(scope: Scope) -> str:
    """The route's template: what clients write is no label."""
    return getattr(scope.get("route"), "path", "other")


class _Gate:
    """Asks for a key, and counts; the routes for text do both themselves.

    HEAD is answered where GET is; so is OPTIONS of the probes, with which HAProxy asks. A trailing
    slash changes nothing.
    """

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app = app
        self._service = service
        self._open = {"/health", "/ready", "/"}
        if service.settings.metrics == "open":
            self._open.add("/metrics")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path = scope["path"].rstrip("/") or "/"
        asks = scope["method"]
        if asks == "HEAD" or (asks == "OPTIONS" and path in ("/health", "/ready")):
            asks = "GET"  # uvicorn, which knows better, leaves the body out
        scope = {**scope, "path": path, "method": asks}
        status = 500

        async def counted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            if path not in self._open:
                scope.setdefault("state", {})["user"] = self._user(path, dict(scope["headers"]))
            await self._app(scope, receive, counted)
        except ApiError as error:
            self._service.count_error(error, _route_of(scope))
            await _response(error, scope)(scope, receive, counted)
        finally:
            self._service.metrics.requests.labels(_route_of(scope), "", str(status)).inc()

    def _user(self, path: str, headers: dict[bytes, bytes]) -> str:
        key = headers.get(b"authorization")
        listed = path in ("/v1/models", "/version") or path.startswith("/v1/models/")
        if listed and key is None and self._service.settings.discovery == "open":
            return ANONYMOUS
        return self._service.tenants.identify(key)


_BODIES: Final[dict[str, tuple[type[BaseModel], type[BaseModel], str]]] = {
    CHAT.path: (
        ChatRequest,
        ChatCompletion,
        "Answer a conversation, at once or as a stream of server-sent events",
    ),
    COMPLETIONS.path: (
        CompletionRequest,
        Completion,
        "Write on from a raw prompt, at once or as a stream of server-sent events",
    ),
    "/v1/chat/completions/render": (ChatRequest, RenderedPrompt, ""),
    "/tokenize": (TokenizeRequest, Tokens, ""),
    "/detokenize": (DetokenizeRequest, Text, ""),
}
"""By path: what is sent, what comes back, and what for where FastAPI does not know the route."""


def _describe_bodies(app: FastAPI) -> None:
    """Put what FastAPI does not know, routes that read bodies themselves, into its document."""
    generate = app.openapi

    def openapi() -> dict[str, Any]:
        known = app.openapi_schema is not None
        document = generate()
        if known:
            return document
        place = "#/components/schemas/{model}"
        schemas = document.setdefault("components", {}).setdefault("schemas", {})

        def reference(model: type[BaseModel], mode: Literal["validation", "serialization"]) -> Any:
            schema = model.model_json_schema(ref_template=place, mode=mode)
            schemas.update(schema.pop("$defs", {}) | {model.__name__: schema})
            return {"schema": {"$ref": place.format(model=model.__name__)}}

        for path, (asked, answered, summary) in _BODIES.items():
            route = document["paths"].setdefault(path, {}).setdefault("post", {})
            content = {"application/json": reference(answered, "serialization")}
            if summary:
                route["summary"] = summary
                route["operationId"] = path.removeprefix("/v1/").replace("/", "_")
                content["text/event-stream"] = {}
            route["requestBody"] = {
                "required": True,
                "content": {"application/json": reference(asked, "validation")},
            }
            route["responses"] = {
                "200": {"description": "The answer", "content": content},
                "4XX": {"description": "OpenAI's error envelope: what to change"},
                "5XX": {"description": "OpenAI's error envelope: the server cannot now"},
            }
        return document

    app.openapi = openapi  # type: ignore[method-assign]  # FastAPI's documented way to extend it
