"""Requests about raw text and tokens, and their responses: no roles, no template.

Source: OpenAI's API reference for (legacy) completions, the forms that the LM Evaluation Harness
reads of them, and vLLM's ``/tokenize`` and ``/detokenize``.
"""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, Discriminator, Field, Tag

from synthia_vllm.generate.protocol import (
    ELSEWHERE,
    MAX_TOP_LOGPROBS,
    Elsewhere,
    GenerationRequest,
    Int,
    Shape,
    TokenId,
    Usage,
    absent,
    parse,
)

MAX_PROMPTS: Final = 128
"""In one request; each is a request of its own in the engine."""
DEFAULT_MAX_TOKENS: Final = 16
"""OpenAI's, and not the card's 1024: clients that know this route know that."""

TokenIds = Annotated[list[TokenId], Field(min_length=1)]


def _kind_of_prompt(value: Any) -> str | None:
    if isinstance(value, str):
        return "text"
    first = value[0] if isinstance(value, list) and value else ""
    if isinstance(first, list):
        return "lists of token ids"
    return "token ids" if isinstance(first, int) else "texts"


class CompletionRequest(GenerationRequest):
    """The body of ``POST /v1/completions``: the prompt is what the model sees, to the byte."""

    prompt: Annotated[
        Annotated[str, Tag("text")]
        | Annotated[list[str], Field(min_length=1, max_length=MAX_PROMPTS), Tag("texts")]
        | Annotated[TokenIds, Tag("token ids")]
        | Annotated[
            list[TokenIds], Field(min_length=1, max_length=MAX_PROMPTS), Tag("lists of token ids")
        ],
        Discriminator(_kind_of_prompt),
    ]
    max_tokens: Int | None = Field(None, ge=0)
    echo: bool | None = None
    logprobs: Int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)
    prompt_logprobs: Int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)
    """vLLM's: log-probabilities of the prompt's tokens, in a form of its own."""
    include_stop_str_in_output: bool | None = None
    truncate_prompt_tokens: Int | None = Field(None, ge=-1)
    """So many of a prompt's tokens, the last ones; -1: as many as there is room for."""

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """All of them; texts or token ids."""
        prompt: Any = self.prompt
        return prompt if isinstance(prompt, list) and not isinstance(prompt[0], int) else [prompt]


_RAW: Final = "the prompt is raw here; /v1/chat/completions renders messages"
_COMPLETION_ELSEWHERE: Final[Elsewhere] = {
    **ELSEWHERE,
    "suffix": ("Synthia writes on from a prompt, and cannot fill a gap before a suffix", ("",)),
    "best_of": ("ask for `n` answers with `logprobs` and choose yourself", (1,)),
    "messages": (_RAW, ()),
    "max_completion_tokens": ("it is called `max_tokens` here", ()),
    "top_logprobs": ("`logprobs` is the number here", ()),
    "add_special_tokens": ("send token ids for a prompt without <s>", (True,)),
    "prompt_embeds": ("this server takes texts and token ids", ()),
}


def parse_completion_request(body: bytes, *, refuse_unknown: bool = False) -> CompletionRequest:
    """The request in `body`. Raises `InvalidRequest`, naming the field."""
    return parse(CompletionRequest, body, _COMPLETION_ELSEWHERE, refuse_unknown=refuse_unknown)


class CompletionLogprobs(BaseModel):
    """Of each token: its text, its log-probability, the likeliest ones there, where it begins.

    The first token of an echoed prompt has no log-probability: nothing comes before it.
    """

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class PromptLogprob(BaseModel):
    """vLLM's, of one token at one place of a prompt."""

    logprob: float
    rank: int | None
    decoded_token: str


class CompletionChoice(BaseModel):
    """One text; those of the first prompt come first."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: Literal["stop", "length"]
    stop_reason: int | str | None = None
    token_ids: list[int] | None = Field(None, exclude_if=absent)
    prompt_token_ids: list[int] | None = Field(None, exclude_if=absent)
    prompt_logprobs: list[dict[int, PromptLogprob] | None] | None = Field(None, exclude_if=absent)


class Completion(BaseModel):
    """The body of a plain answer."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage


class TokenizeRequest(Shape):
    """The body of ``POST /tokenize``."""

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


class DetokenizeRequest(Shape):
    """The body of ``POST /detokenize``."""

    tokens: list[TokenId]
    model: str | None = Field(None, max_length=256)


class Text(BaseModel):
    """What tokens mean."""

    prompt: str


class TokenizerInfo(BaseModel):
    """What evaluation tools want to know of the tokenizer."""

    bos_token: str
    eos_token: str
    pad_token: str | None
    model_max_length: int


class RenderedPrompt(BaseModel):
    """What the model would be sent for a chat request, and how."""

    prompt: str
    """The text, after the one <s> that the tokenizer puts in front."""
    prompt_token_ids: list[int]
    count: int
    max_model_len: int
    max_tokens: int
    """The longest answer that there is room for."""
    stop: list[str]
    sampling: dict[str, float | int | None]
    escaped_markers: int
    dropped_messages: int


_TOKENIZE_ELSEWHERE: Final[Elsewhere] = {
    "messages": ("/v1/chat/completions/render has the prompt of messages, and its tokens", ()),
}


def parse_tokenize_request(body: bytes, *, refuse_unknown: bool = False) -> TokenizeRequest:
    """The request in `body`. Raises `InvalidRequest`, naming the field."""
    return parse(TokenizeRequest, body, _TOKENIZE_ELSEWHERE, refuse_unknown=refuse_unknown)


def parse_detokenize_request(body: bytes, *, refuse_unknown: bool = False) -> DetokenizeRequest:
    """The request in `body`. Raises `InvalidRequest`, naming the field."""
    return parse(DetokenizeRequest, body, {}, refuse_unknown=refuse_unknown)
