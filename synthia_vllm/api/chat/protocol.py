"""OpenAI's chat API as this server speaks it.

Responses have OpenAI's fields plus vLLM's and ours: `stop_reason` and `token_ids` in a choice,
`dropped_messages` in the usage.

Source: OpenAI's API reference for chat completions; vLLM's extra parameters.
"""

from __future__ import annotations

from typing import Annotated, Final, Literal

from pydantic import BaseModel, Discriminator, Field, Tag

from synthia_vllm.generate.protocol import (
    MAX_TOP_LOGPROBS,
    UNSUPPORTED,
    GenerationRequest,
    Int,
    StrictModel,
    Unsupported,
    Usage,
    absent,
    at_most,
)

MAX_MESSAGES: Final = 4096
MAX_PARTS: Final = 1024
MAX_METADATA: Final = 16

_UNSUPPORTED: Final[Unsupported] = {
    **UNSUPPORTED,
    "prompt": ("chat has `messages`; /v1/completions takes a raw prompt", ()),
    "echo": ("it belongs to completions, not to chat", (False,)),
    "suffix": ("Synthia writes on, and cannot fill a gap", ("",)),
    "chat_template": ("the prompt format is the server's, see its `format` setting", ()),
    "include_stop_str_in_output": ("a turn's marker is never part of an answer", (False,)),
    "prompt_logprobs": ("/v1/completions has them", ()),
    "truncate_prompt_tokens": (
        "it would cut a conversation in the middle of a turn; the server's `overflow` setting "
        "drops whole exchanges",
        (),
    ),
}


class TextPart(StrictModel):
    """A piece of text in a message's content; the only kind the model reads."""

    type: Literal["text"]
    text: str


class ChatMessage(StrictModel):
    """One message of the conversation so far."""

    role: Literal["system", "developer", "user", "assistant"]
    content: (
        Annotated[
            Annotated[str, Tag("text")]
            | Annotated[list[TextPart], Field(max_length=MAX_PARTS), Tag("parts")],
            Discriminator(lambda value: "text" if isinstance(value, str) else "parts"),
        ]
        | None
    ) = None
    """May be missing, as in an answer of nothing but tool calls, for the assistant only."""

    @property
    def text(self) -> str:
        """The whole content; parts are joined by newlines."""
        if self.content is None:
            return ""
        if isinstance(self.content, str):
            return self.content
        return "\n".join(part.text for part in self.content)


class ChatRequest(GenerationRequest):
    """The body of ``POST /v1/chat/completions``."""

    unsupported = _UNSUPPORTED

    messages: list[ChatMessage] = Field(min_length=1, max_length=MAX_MESSAGES)
    max_tokens: Int | None = Field(None, ge=1)
    max_completion_tokens: Int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: Int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)
    continue_final_message: bool | None = None
    add_generation_prompt: bool | None = None
    # Labels, as `user`.
    metadata: Annotated[dict[str, str] | None, at_most(MAX_METADATA)] = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None


class TopLogprob(BaseModel):
    """One of the most likely tokens at a place."""

    token: str
    logprob: float
    bytes: list[int] | None


class TokenLogprobInfo(TopLogprob):
    """One token of the answer, and what else was likely there."""

    top_logprobs: list[TopLogprob]


class ChoiceLogprobs(BaseModel):
    """Log-probabilities of an answer, a token at a time."""

    content: list[TokenLogprobInfo]


class AnswerMessage(BaseModel):
    """The assistant's message."""

    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class ChatChoice(BaseModel):
    """One answer."""

    index: int
    message: AnswerMessage
    logprobs: ChoiceLogprobs | None = None
    finish_reason: Literal["stop", "length"]
    stop_reason: int | str | None = None
    token_ids: list[int] | None = Field(None, exclude_if=absent)
    """With `return_token_ids`: all tokens that ran, those of a stop included."""


class ChatCompletion(BaseModel):
    """The body of a plain answer."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    prompt_token_ids: list[int] | None = Field(None, exclude_if=absent)


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
