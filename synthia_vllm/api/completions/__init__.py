"""``/v1/completions``: raw text, written on; and its tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from synthia_vllm.api.completions.protocol import Completion, CompletionRequest
from synthia_vllm.api.completions.render import add_render
from synthia_vllm.api.completions.serving import prepare
from synthia_vllm.api.completions.wire import TextChunks, body
from synthia_vllm.http.route import GenerationRoute

if TYPE_CHECKING:
    from synthia_vllm.http.application import Application
    from synthia_vllm.http.state import ServerState

ROUTE: Final = GenerationRoute(
    path="/v1/completions",
    operation="text_completion",
    summary="Write on from a raw prompt, at once or as a stream of server-sent events",
    request=CompletionRequest,
    response=Completion,
    prepare=prepare,
    body=body,
    events=TextChunks,
)


def attach(app: Application, state: ServerState) -> None:
    """Add the routes."""
    app.add_generation(ROUTE)
    add_render(app, state)
