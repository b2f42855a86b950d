"""``/v1/messages/count_tokens``: how long a prompt is."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastapi.responses import Response  # noqa: TC002  # FastAPI reads the route's annotations
from starlette.requests import Request  # noqa: TC002

from synthia_vllm.api.messages.protocol import CountTokensRequest, TokenCount
from synthia_vllm.api.messages.serving import compose
from synthia_vllm.api.messages.wire import envelope
from synthia_vllm.generate.protocol import SamplingRequest
from synthia_vllm.http.body import parse_body

if TYPE_CHECKING:
    from synthia_vllm.http.application import Application
    from synthia_vllm.http.state import ServerState


def add_count_tokens(app: Application, state: ServerState) -> None:
    """Add the route. It asks the engine for no token, so it does not count towards limits."""
    path = "/v1/messages/count_tokens"
    engine, settings = state.engine, state.settings

    @app.post(path)
    async def count_tokens(request: Request, response: Response) -> TokenCount:
        """The tokens of the prompt that the same message would be answered from; nothing runs."""
        asked = await parse_body(CountTokensRequest, state, request, response)
        user = state.admission.user(request.state.user)
        sampling = SamplingRequest(model=asked.model)
        cache_salt = state.admission.cache_salt(request.state.user, None)
        composed = await compose(asked, sampling, engine, settings, user, cache_salt=cache_salt)
        return TokenCount(input_tokens=len(composed.token_ids))

    app.bodies[path] = CountTokensRequest
    app.envelopes[path] = envelope
