"""``/v1/responses``: a conversation's next answer, in the form of OpenAI's newer API."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from synthia_vllm.api.responses.protocol import ResponseObject, ResponsesRequest
from synthia_vllm.api.responses.serving import prepare
from synthia_vllm.api.responses.wire import TypedEvents, body
from synthia_vllm.http.route import GenerationRoute

if TYPE_CHECKING:
    from synthia_vllm.http.application import Application
    from synthia_vllm.http.state import ServerState

ROUTE: Final = GenerationRoute(
    path="/v1/responses",
    operation="chat",
    summary="Answer a conversation, at once or as a stream of typed events; nothing is stored",
    request=ResponsesRequest,
    response=ResponseObject,
    prepare=prepare,
    body=body,
    events=TypedEvents,
)


def attach(app: Application, _state: ServerState) -> None:
    """Add the route."""
    app.add_generation(ROUTE)
