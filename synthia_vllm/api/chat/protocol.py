"""OpenAI's chat API as this server speaks it.

Responses have OpenAI's fields plus vLLM's and ours: `stop_reason` and `token_ids` in a choice,
`dropped_messages` in the usage.

Source: OpenAI's API reference for chat completions; vLLM's extra parameters.
"""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, Discriminator, Field, Tag

from synthia_vllm.generate.protocol import (
    MAX_MESSAGES,
    MAX_METADATA,
    MAX_PARTS,
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

MAX_TOOLS: Final = 128
"""Of a request, and calls of a message."""

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


FunctionName = Annotated[str, Field(min_length=1, max_length=128)]


class FunctionCall(StrictModel):
    """Which function is called, with what."""

    name: FunctionName
    arguments: str
    """JSON, as the model wrote it."""


class ToolCall(StrictModel):
    """A call that the assistant made, in a message or in an answer."""

    id: str
    type: Literal["function"]
    function: FunctionCall


class Function(StrictModel):
    """What can be called."""

    name: FunctionName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    """The schema of its arguments; without one it has none."""
    strict: bool | None = None
    """Arguments are held to the schema in any case."""


class Tool(StrictModel):
    """A tool that the request offers; only a function can be forced."""

    type: str
    function: Function | None = None


class ChosenFunction(StrictModel):
    """The function that is to be called."""

    name: FunctionName


class NamedTool(StrictModel):
    """The one tool that is to be called."""

    type: Literal["function"]
    function: ChosenFunction


class ChatMessage(StrictModel):
    """One message of the conversation so far."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: (
        Annotated[
            Annotated[str, Tag("text")]
            | Annotated[list[TextPart], Field(max_length=MAX_PARTS), Tag("parts")],
            Discriminator(lambda value: "text" if isinstance(value, str) else "parts"),
        ]
        | None
    ) = None
    """May be missing, as in an answer of nothing but tool calls, for the assistant only."""
    tool_calls: list[ToolCall] | None = Field(None, max_length=MAX_TOOLS)
    tool_call_id: str | None = None
    """Which call a message of a tool is the result of."""

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
    tools: list[Tool] | None = Field(None, max_length=MAX_TOOLS)
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    """An answer has one call at most, which both values admit."""
    # Labels, as `user`.
    metadata: Annotated[dict[str, str] | None, at_most(MAX_METADATA)] = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None

    @property
    def ignored(self) -> tuple[str, ...]:
        """Tools that are not to be called are left out, where they are not refused."""
        left_out = self.tools and self.tool_choice in (None, "auto", "none")
        return (*(("tools",) if left_out else ()), *super().ignored)


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
    content: str | None
    tool_calls: list[ToolCall] | None = Field(None, exclude_if=absent)
    refusal: None = None


class ChatChoice(BaseModel):
    """One answer."""

    index: int
    message: AnswerMessage
    logprobs: ChoiceLogprobs | None = None
    finish_reason: Literal["stop", "length", "tool_calls"]
    stop_reason: int | str | None = None
    token_ids: list[int] | None = Field(None, exclude_if=absent)
    """With `return_token_ids`: all tokens that ran, those of a stop included."""


class ChatCompletion(BaseModel):
    """The body of a plain answer."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: Usage
    prompt_token_ids: list[int] | None = Field(None, exclude_if=absent)


class RenderedPrompt(BaseModel):
    """What the model would be sent for a chat request, and how."""

    prompt: str
    """The text, after the one <s> that the tokenizer puts in front."""
    prompt_token_ids: list[int]
    token_ids: list[int]
    """The same, by the name that llm-d's endpoint picker asks for."""
    count: int
    max_model_len: int
    max_tokens: int
    """The longest answer that there is room for."""
    stop: list[str]
    sampling: dict[str, float | int | None]
    escaped_markers: int
    dropped_messages: int
