"""``/v1/messages``: a conversation's next answer by Anthropic's API, and its prompt's length."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from synthia_vllm.api.messages.count_tokens import add_count_tokens
from synthia_vllm.api.messages.protocol import MessageResponse, MessagesRequest
from synthia_vllm.api.messages.serving import prepare
from synthia_vllm.api.messages.wire import MessageEvents, body, envelope
from synthia_vllm.http.route import GenerationRoute

if TYPE_CHECKING:
    from synthia_vllm.http.application import Application
    from synthia_vllm.http.state import ServerState

ROUTE: Final = GenerationRoute(
    path="/v1/messages",
    operation="messages",
    summary="Answer a conversation as Anthropic's API does, at once or as a stream of events",
    request=MessagesRequest,
    response=MessageResponse,
    prepare=prepare,
    body=body,
    events=MessageEvents,
    envelope=envelope,
    id_headers=(b"request-id",),
)


def attach(app: Application, state: ServerState) -> None:
    """Add the routes."""
    app.add_generation(ROUTE)
    add_count_tokens(app, state)
