"""Before FastAPI's routes: whose request it is, how it may be spelled, and what it is told."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from starlette.exceptions import HTTPException
from starlette.requests import Request  # noqa: TC002  # FastAPI reads the handlers' annotations

from synthia_vllm.admission.users import ANONYMOUS
from synthia_vllm.errors import ApiError, EngineFault, InvalidRequest, NoSuchRoute
from synthia_vllm.http.body import ClientLeft, identify, keyed
from synthia_vllm.http.errors import error_response, openai_envelope, request_id
from synthia_vllm.http.handler import CLIENT_LEFT

if TYPE_CHECKING:
    from fastapi import FastAPI
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from synthia_vllm.http.state import ServerState


class Gate:
    """Asks for a key, and counts; the routes for text do both themselves.

    HEAD is answered where GET is; so is OPTIONS of the probes, with which HAProxy asks. A trailing
    slash changes nothing.
    """

    def __init__(self, app: ASGIApp, state: ServerState) -> None:
        self._app = app
        self._state = state
        self._open = {"/health", "/ping", "/ready", "/"}
        if state.settings.metrics == "open":
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
            self._state.count_error(error, route_of(scope))
            await _response(error, scope)(scope, receive, counted)
        finally:
            self._state.metrics.requests.labels(route_of(scope), "", str(status)).inc()

    def _user(self, path: str, headers: dict[bytes, bytes]) -> str:
        listed = path in ("/v1/models", "/version", "/load") or path.startswith("/v1/models/")
        if listed and self._state.settings.discovery == "open" and not keyed(headers):
            return ANONYMOUS
        return identify(self._state, headers)


def add_error_handlers(app: FastAPI, state: ServerState) -> None:
    def told(request: Request, error: ApiError) -> Response:
        """`error` as a response, counted."""
        state.count_error(error, route_of(request.scope))
        return _response(error, request.scope)

    @app.exception_handler(ApiError)
    async def api_error(request: Request, error: ApiError) -> Response:
        return told(request, error)

    @app.exception_handler(RequestValidationError)
    async def bad_query(request: Request, error: RequestValidationError) -> Response:
        """What FastAPI checks itself: the parts of a URL."""
        problem = error.errors()[0]
        name = str(problem["loc"][-1])
        return told(
            request,
            InvalidRequest(
                f"`{name}`: {problem['msg']}, but it is {str(problem['input'])[:60]!r}.",
                param=name,
                code="invalid_value",
            ),
        )

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

    @app.exception_handler(ClientLeft)
    async def client_left(_request: Request, _error: ClientLeft) -> Response:
        return Response(status_code=CLIENT_LEFT)  # to nobody


def _response(error: ApiError, scope: Scope) -> Response:
    envelope = scope["app"].envelopes.get(scope["path"], openai_envelope)
    known = request_id(dict(scope["headers"]))
    status, headers, body = error_response(error, known, envelope=envelope)
    response = Response(body, status)
    response.raw_headers = headers
    return response


def route_of(scope: Scope) -> str:
    """The route's template: what clients write is no label."""
    return getattr(scope.get("route"), "path", "other")
