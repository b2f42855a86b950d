"""The routes. None of them asks the engine for a token, so none counts towards limits."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastapi.responses import Response  # noqa: TC002  # FastAPI reads the routes' annotations
from starlette.requests import Request  # noqa: TC002

from synthia_vllm.api.tokenize.protocol import (
    DetokenizeRequest,
    DetokenizeResponse,
    TokenizeRequest,
    TokenizerInfo,
    Tokens,
)
from synthia_vllm.errors import InvalidRequest
from synthia_vllm.generate.sampling import preset_of
from synthia_vllm.http.body import parse_body

if TYPE_CHECKING:
    from synthia_vllm.http.application import Application
    from synthia_vllm.http.state import ServerState


def attach(app: Application, state: ServerState) -> None:
    """Add the routes."""
    engine = state.engine

    def check_model(asked: TokenizeRequest | DetokenizeRequest, request: Request) -> None:
        if asked.model is not None:
            preset_of(asked.model, state.settings, state.admission.user(request.state.user))

    @app.post("/tokenize", response_model_exclude_none=True)
    async def tokenize(request: Request, response: Response) -> Tokens:
        """A raw text's tokens."""
        asked = await parse_body(TokenizeRequest, state, request, response)
        check_model(asked, request)
        ids = await engine.tokenize(asked.prompt, special_tokens=True)
        if asked.add_special_tokens is False:
            ids = ids[1:]
        strings = None
        if asked.return_token_strs:
            names = engine.model_info.special_tokens
            strings = [
                names.get(token) or engine.token_bytes(token).decode(errors="replace")
                for token in ids
            ]
        return Tokens(
            count=len(ids),
            max_model_len=engine.model_info.max_model_len,
            tokens=ids,
            token_strs=strings,
        )

    @app.post("/detokenize")
    async def detokenize(request: Request, response: Response) -> DetokenizeResponse:
        """The text of tokens."""
        asked = await parse_body(DetokenizeRequest, state, request, response)
        check_model(asked, request)
        size = engine.model_info.vocab_size
        if any(token >= size for token in asked.tokens):
            raise InvalidRequest(
                f"`tokens` has {max(asked.tokens)}; the model has {size} tokens, from 0.",
                param="tokens",
                code="invalid_value",
            )
        return DetokenizeResponse(prompt=await engine.detokenize(asked.tokens))

    @app.get("/tokenizer_info")
    async def tokenizer_info() -> TokenizerInfo:
        """The special tokens, for evaluation tools. There is no chat template: see render."""
        info = engine.model_info
        return TokenizerInfo(
            bos_token=info.bos,
            eos_token=info.eos,
            pad_token=None,
            model_max_length=info.max_model_len,
        )

    app.bodies |= {"/tokenize": TokenizeRequest, "/detokenize": DetokenizeRequest}
