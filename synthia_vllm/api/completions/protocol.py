"""OpenAI's (legacy) completions as this server speaks them: no roles, no template.

Source: OpenAI's API reference for completions, and the forms that the LM Evaluation Harness reads
of them.
"""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, Discriminator, Field, Tag

from synthia_vllm.generate.protocol import (
    MAX_TOP_LOGPROBS,
    UNSUPPORTED,
    GenerationRequest,
    Int,
    TokenId,
    Unsupported,
    Usage,
    absent,
)

MAX_PROMPTS: Final = 128
"""In one request; each is a request of its own in the engine."""
DEFAULT_MAX_TOKENS: Final = 16
"""OpenAI's, and not the card's 1024: clients that know this route know that."""

_RAW: Final = "the prompt is raw here; /v1/chat/completions renders messages"
_UNSUPPORTED: Final[Unsupported] = {
    **UNSUPPORTED,
    "suffix": ("Synthia writes on from a prompt, and cannot fill a gap before a suffix", ("",)),
    "best_of": ("ask for `n` answers with `logprobs` and choose yourself", (1,)),
    "messages": (_RAW, ()),
    "max_completion_tokens": ("it is called `max_tokens` here", ()),
    "top_logprobs": ("`logprobs` is the number here", ()),
    "add_special_tokens": ("send token ids for a prompt without <s>", (True,)),
    "prompt_embeds": ("this server takes texts and token ids", ()),
}

Prompt = Annotated[list[TokenId], Field(min_length=1)]


def _kind_of_prompt(value: Any) -> str | None:
    if isinstance(value, str):
        return "text"
    first = value[0] if isinstance(value, list) and value else ""
    if isinstance(first, list):
        return "lists of token ids"
    return "token ids" if isinstance(first, int) else "texts"


class CompletionRequest(GenerationRequest):
    """The body of ``POST /v1/completions``: the prompt is what the model sees, to the byte."""

    unsupported = _UNSUPPORTED

    prompt: Annotated[
        Annotated[str, Tag("text")]
        | Annotated[list[str], Field(min_length=1, max_length=MAX_PROMPTS), Tag("texts")]
        | Annotated[Prompt, Tag("token ids")]
        | Annotated[
            list[Prompt], Field(min_length=1, max_length=MAX_PROMPTS), Tag("lists of token ids")
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


class CompletionLogprobs(BaseModel):
    """Of each token: its text, its log-probability, the likeliest ones there, where it begins.

    The first token of an echoed prompt has no log-probability: nothing comes before it.
    """

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class PromptLogprob(BaseModel):
    """vLLM's, of one token at one position of a prompt."""

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
    system_fingerprint: str
    choices: list[CompletionChoice]
    usage: Usage


class RenderedTokens(BaseModel):
    """What the model would be sent for one prompt, by the names that llm-d's picker asks for."""

    token_ids: list[int]
    count: int
