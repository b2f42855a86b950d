"""``/v1/chat/completions``: a conversation's next answer, and the prompt it would be made from."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from synthia_vllm.api.chat.protocol import ChatCompletion, ChatRequest
from synthia_vllm.api.chat.render import add_render
from synthia_vllm.api.chat.serving import prepare
from synthia_vllm.api.chat.wire import ChatChunks, body
from synthia_vllm.http.route import GenerationRoute

if TYPE_CHECKING:
    from synthia_vllm.http.application import Application
    from synthia_vllm.http.state import ServerState

ROUTE: Final = GenerationRoute(
    path="/v1/chat/completions",
    operation="chat",
    summary="Answer a conversation, at once or as a stream of server-sent events",
    request=ChatRequest,
    response=ChatCompletion,
    prepare=prepare,
    body=body,
    events=ChatChunks,
)


def attach(app: Application, state: ServerState) -> None:
    """Add the routes."""
    app.add_generation(ROUTE)
    add_render(app, state)
