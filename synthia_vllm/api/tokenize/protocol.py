"""Requests about texts and tokens, and their responses.

Source: vLLM's ``/tokenize`` and ``/detokenize``.
"""

from __future__ import annotations

from typing import ClassVar

from pydantic import BaseModel, Field

from synthia_vllm.generate.protocol import RequestBody, TokenId, Unsupported


class TokenizeRequest(RequestBody):
    """The body of ``POST /tokenize``."""

    unsupported: ClassVar[Unsupported] = {
        "messages": ("/v1/chat/completions/render has the prompt of messages, and its tokens", ()),
    }

    prompt: str
    model: str | None = Field(None, max_length=256)
    add_special_tokens: bool | None = None
    """Whether <s> comes in front, as in a prompt (default true)."""
    return_token_strs: bool | None = None


class Tokens(BaseModel):
    """A text as the model reads it."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class DetokenizeRequest(RequestBody):
    """The body of ``POST /detokenize``."""

    tokens: list[TokenId]
    model: str | None = Field(None, max_length=256)


class DetokenizeResponse(BaseModel):
    """What tokens mean."""

    prompt: str


class TokenizerInfo(BaseModel):
    """What evaluation tools want to know of the tokenizer."""

    bos_token: str
    eos_token: str
    pad_token: str | None
    model_max_length: int
