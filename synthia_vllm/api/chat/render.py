"""``/v1/chat/completions/render``: what the model would be sent."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastapi.responses import Response  # noqa: TC002  # FastAPI reads the route's annotations
from starlette.requests import Request  # noqa: TC002

from synthia_vllm.api.chat.protocol import ChatRequest, RenderedPrompt
from synthia_vllm.api.chat.serving import compose
from synthia_vllm.http.body import parse_body

if TYPE_CHECKING:
    from synthia_vllm.http.application import Application
    from synthia_vllm.http.state import ServerState


def add_render(app: Application, state: ServerState) -> None:
    """Add the route. It asks the engine for no token, so it does not count towards limits."""
    path = "/v1/chat/completions/render"
    engine, settings = state.engine, state.settings

    @app.post(path)
    async def render(request: Request, response: Response) -> RenderedPrompt:
        """The exact prompt a chat request would be answered from; nothing runs."""
        asked = await parse_body(ChatRequest, state, request, response)
        user = state.admission.user(request.state.user)
        cache_salt = state.admission.cache_salt(request.state.user, asked.cache_salt)
        composed = await compose(asked, engine, settings, user, cache_salt)
        sampling = composed.sampling
        shown = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed", "n")
        return RenderedPrompt(
            prompt=composed.text,
            prompt_token_ids=composed.token_ids,
            token_ids=composed.token_ids,
            count=len(composed.token_ids),
            max_model_len=engine.model_info.max_model_len,
            max_tokens=sampling.max_tokens,
            stop=list(sampling.stop),
            sampling={name: getattr(sampling, name) for name in shown},
            escaped_markers=composed.escaped_markers,
            dropped_messages=composed.dropped_messages,
        )

    app.bodies[path] = ChatRequest
