"""The ASGI application: FastAPI, but for the routes that carry every token."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware
from starlette.routing import Route

from synthia_vllm.http.handler import Endpoint

if TYPE_CHECKING:
    from pydantic import BaseModel
    from starlette.types import ASGIApp, Receive, Scope, Send

    from synthia_vllm.http.errors import Envelope
    from synthia_vllm.http.route import GenerationRoute
    from synthia_vllm.http.state import ServerState


class Application(FastAPI):
    """Requests of the routes that generate pass nothing but their `Endpoint`."""

    def __init__(self, state: ServerState, **options: Any) -> None:
        super().__init__(**options)
        self.server_state = state
        self.generation: list[GenerationRoute] = []
        self.bodies: dict[str, type[BaseModel]] = {}
        """By path: what FastAPI's routes that read their bodies themselves are sent."""
        self.envelopes: dict[str, Envelope] = {}
        """By path: how errors are told there, where it is not OpenAI's way."""
        self._endpoints: dict[str, Endpoint] = {}
        self._outermost: ASGIApp = self._serve
        origins = state.settings.cors_origins
        if origins:
            self._outermost = CORSMiddleware(
                self._serve,
                allow_origins=origins,
                allow_methods=("GET", "POST", "DELETE"),
                allow_headers=("*",),
                expose_headers=("*",),
            )

    def add_generation(self, route: GenerationRoute) -> None:
        """Serve `route`."""
        endpoint = Endpoint(self.server_state, route)
        self.generation.append(route)
        self._endpoints[route.path] = endpoint
        self.envelopes[route.path] = route.envelope
        self.router.routes.append(Route(route.path, endpoint, methods=["POST"]))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._outermost(scope, receive, send)

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["method"] == "POST":
            endpoint = self._endpoints.get(scope["path"].rstrip("/"))
            if endpoint is not None:
                await endpoint(scope, receive, send)
                return
        await super().__call__(scope, receive, send)
