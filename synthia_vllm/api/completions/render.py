"""``/v1/completions/render``: the tokens that the model would be sent."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastapi.responses import Response  # noqa: TC002  # FastAPI reads the route's annotations
from starlette.requests import Request  # noqa: TC002

from synthia_vllm.api.completions.protocol import CompletionRequest, RenderedTokens
from synthia_vllm.api.completions.serving import tokenized
from synthia_vllm.http.body import parse_body

if TYPE_CHECKING:
    from synthia_vllm.http.application import Application
    from synthia_vllm.http.state import ServerState


def add_render(app: Application, state: ServerState) -> None:
    """Add the route. It asks the engine for no token, so it does not count towards limits."""
    path = "/v1/completions/render"
    engine, settings = state.engine, state.settings

    @app.post(path)
    async def render(request: Request, response: Response) -> list[RenderedTokens]:
        """The tokens of each prompt of a request for completions; nothing runs."""
        asked = await parse_body(CompletionRequest, state, request, response)
        user = state.admission.user(request.state.user)
        _, prompts = await tokenized(asked, engine, settings, user)
        return [RenderedTokens(token_ids=prompt, count=len(prompt)) for prompt in prompts]

    app.bodies[path] = CompletionRequest
