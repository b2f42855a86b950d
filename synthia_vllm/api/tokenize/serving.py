"""Routes for looking at prompts: what the model would be sent, text as tokens, tokens as text."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastapi.responses import Response
from starlette.requests import Request  # noqa: TC002  # FastAPI reads the routes' annotations

from synthia_vllm.api.chat.serving import compose
from synthia_vllm.api.completions.protocol import (
    RenderedPrompt,
    Text,
    TokenizerInfo,
    Tokens,
    parse_detokenize_request,
    parse_tokenize_request,
)
from synthia_vllm.errors import InvalidRequest
from synthia_vllm.generate.protocol import parse_chat_request
from synthia_vllm.generate.sampling import preset_of
from synthia_vllm.http.handler import CLIENT_LEFT, IGNORED, ClientLeft, read_body

if TYPE_CHECKING:
    from fastapi import FastAPI

    from synthia_vllm.admission.tenants import User
    from synthia_vllm.generate.protocol import Shape
    from synthia_vllm.http.state import Service


def add_workbench(app: FastAPI, service: Service) -> None:
    """Add the routes. None of them asks the engine for a token, so none counts towards limits."""
    engine, settings = service.engine, service.settings
    refuse = settings.refuse_unknown

    def user_of(request: Request) -> User:
        return service.tenants.user(request.state.user)

    async def body_of(request: Request) -> bytes:
        headers = dict(request.scope["headers"])
        return await read_body(headers, request.receive, settings.limits.max_body_bytes)

    def say_ignored(asked: Shape, response: Response) -> None:
        if asked.ignored:
            service.note_ignored(asked.ignored)
            response.headers[IGNORED.decode()] = ", ".join(asked.ignored)

    @app.exception_handler(ClientLeft)
    async def client_left(_request: Request, _error: ClientLeft) -> Response:
        return Response(status_code=CLIENT_LEFT)  # to nobody

    @app.post("/v1/chat/completions/render")
    async def render(request: Request, response: Response) -> RenderedPrompt:
        """The exact prompt a chat request would be answered from; nothing runs."""
        asked = parse_chat_request(await body_of(request), refuse_unknown=refuse)
        say_ignored(asked, response)
        composed = await compose(asked, engine, settings, user_of(request))
        sampling = composed.sampling
        shown = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed", "n")
        return RenderedPrompt(
            prompt=composed.text,
            prompt_token_ids=composed.token_ids,
            count=len(composed.token_ids),
            max_model_len=engine.traits.max_model_len,
            max_tokens=sampling.max_tokens,
            stop=list(sampling.stop),
            sampling={name: getattr(sampling, name) for name in shown},
            escaped_markers=composed.escaped_markers,
            dropped_messages=composed.dropped_messages,
        )

    @app.post("/tokenize", response_model_exclude_none=True)
    async def tokenize(request: Request, response: Response) -> Tokens:
        """A raw text's tokens."""
        asked = parse_tokenize_request(await body_of(request), refuse_unknown=refuse)
        say_ignored(asked, response)
        if asked.model is not None:
            preset_of(asked.model, settings, user_of(request))
        ids = await engine.tokenize(asked.prompt, special_tokens=True)
        if asked.add_special_tokens is False:
            ids = ids[1:]
        strings = None
        if asked.return_token_strs:
            names = engine.traits.special_tokens
            strings = [
                names.get(token) or engine.token_bytes(token).decode(errors="replace")
                for token in ids
            ]
        return Tokens(
            count=len(ids),
            max_model_len=engine.traits.max_model_len,
            tokens=ids,
            token_strs=strings,
        )

    @app.post("/detokenize")
    async def detokenize(request: Request, response: Response) -> Text:
        """The text of tokens."""
        asked = parse_detokenize_request(await body_of(request), refuse_unknown=refuse)
        say_ignored(asked, response)
        if asked.model is not None:
            preset_of(asked.model, settings, user_of(request))
        size = engine.traits.vocab_size
        if any(token >= size for token in asked.tokens):
            raise InvalidRequest(
                f"`tokens` has {max(asked.tokens)}; the model has {size} tokens, from 0.",
                param="tokens",
                code="invalid_value",
            )
        return Text(prompt=await engine.detokenize(asked.tokens))

    @app.get("/tokenizer_info")
    async def tokenizer_info() -> TokenizerInfo:
        """The special tokens, for evaluation tools. There is no chat template: see render."""
        traits = engine.traits
        return TokenizerInfo(
            bos_token=traits.bos,
            eos_token=traits.eos,
            pad_token=None,
            model_max_length=traits.max_model_len,
        )
