"""Anthropic's Messages API as this server speaks it: text in, text out.

Source: Anthropic's API reference and its Python SDK's types; vLLM's extra sampling parameters.
"""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, BeforeValidator, Discriminator, Field, Tag
from pydantic_core import PydanticCustomError

from synthia_vllm.generate.protocol import (
    MAX_MESSAGES,
    MAX_PARTS,
    MAX_STOPS,
    NO_TOOLS,
    TEXT_ONLY,
    UNSUPPORTED,
    Int,
    RequestBody,
    SamplingRequest,
    StopString,
    StrictModel,
    Unsupported,
    few_stops,
)

_NO_THINKING: Final = "Synthia has no separate reasoning"
_ONE_ANSWER: Final = "this route gives one answer"
_SCHEMA: Final = "here it is `output_config.format`"
_CHAT_HAS_IT: Final = "/v1/chat/completions has log-probabilities"
_UNSUPPORTED: Final[Unsupported] = {
    **UNSUPPORTED,
    "tool_choice": (NO_TOOLS, ({"type": "none"},)),
    "mcp_servers": (NO_TOOLS, ([],)),
    "container": ("this server runs no code", ()),
    "thinking": (_NO_THINKING, ({"type": "disabled"},)),
    "output_format": (_SCHEMA, ()),
    # OpenAI's names on this route.
    "stop": ("here it is `stop_sequences`", ([],)),
    "n": (_ONE_ANSWER, (1,)),
    "best_of": (_ONE_ANSWER, (1,)),
    "response_format": (_SCHEMA, ({"type": "text"},)),
    "structured_outputs": (_SCHEMA, ()),
    "logprobs": (_CHAT_HAS_IT, (False,)),
    "logprob_token_ids": (_CHAT_HAS_IT, ([],)),
}

_TOOL_BLOCKS: Final = ("tool_use", "tool_result", "server_tool_use")
_THINKING_BLOCKS: Final = ("thinking", "redacted_thinking")


def _only_text(block: Any) -> Any:
    """Refuse a block of another type by what it is, not by the first field that it lacks."""
    kind = block.get("type") if isinstance(block, dict) else None
    if not isinstance(kind, str) or kind == "text":
        return block
    why = TEXT_ONLY
    if kind in _TOOL_BLOCKS or kind.endswith("_tool_result"):
        why = NO_TOOLS
    elif kind in _THINKING_BLOCKS:
        why = _NO_THINKING
    raise PydanticCustomError(
        "unsupported_block",
        "a block of type {kind} is not supported: {why}",
        {"kind": f"{kind!r:.60}", "why": why},
    )


class TextBlockParam(StrictModel):
    """A piece of text; the only kind of block the model reads."""

    type: Literal["text"]
    text: str


Content = Annotated[
    Annotated[str, Tag("text")]
    | Annotated[
        list[Annotated[TextBlockParam, BeforeValidator(_only_text)]],
        Field(max_length=MAX_PARTS),
        Tag("blocks"),
    ],
    Discriminator(lambda value: "text" if isinstance(value, str) else "blocks"),
]


class MessageParam(StrictModel):
    """One message of the conversation so far."""

    role: Literal["user", "assistant"]
    content: Content


class CountTokensRequest(RequestBody):
    """The body of ``POST /v1/messages/count_tokens``: what makes a prompt."""

    unsupported = _UNSUPPORTED

    model: str = Field(max_length=256)
    messages: list[MessageParam] = Field(min_length=1, max_length=MAX_MESSAGES)
    system: Content | None = None


class MessagesMetadata(StrictModel):
    """A label for the client's own bookkeeping; it asks nothing of the answer."""

    user_id: str | None = None


class JsonOutputFormat(StrictModel):
    """JSON of this schema."""

    type: Literal["json_schema"]
    schema_: dict[str, Any] = Field(alias="schema")


class OutputConfig(StrictModel):
    """What the answer must look like."""

    format: JsonOutputFormat | None = None


class MessagesRequest(CountTokensRequest, SamplingRequest):
    """The body of ``POST /v1/messages``."""

    max_tokens: Int = Field(ge=1)
    temperature: float | None = Field(None, ge=0, le=1)
    stop_sequences: Annotated[list[StopString], Field(max_length=MAX_STOPS)] | None = None
    output_config: OutputConfig | None = None
    metadata: MessagesMetadata | None = None

    @property
    def own_stops(self) -> list[str]:
        return few_stops(self.stop_sequences or [], "stop_sequences")


class TokenCount(BaseModel):
    """How long a prompt is."""

    input_tokens: int


class TextBlock(BaseModel):
    """The answer's text."""

    type: Literal["text"] = "text"
    text: str


class MessagesUsage(BaseModel):
    """Tokens that ran; the three kinds of input together are the prompt."""

    input_tokens: int
    cache_creation_input_tokens: int = 0
    cache_read_input_tokens: int
    output_tokens: int


StopReason = Literal["end_turn", "max_tokens", "stop_sequence"]


class MessageResponse(BaseModel):
    """The body of a plain answer; without text and end, the beginning of a streamed one."""

    id: str
    type: Literal["message"] = "message"
    role: Literal["assistant"] = "assistant"
    model: str
    content: list[TextBlock]
    stop_reason: StopReason | None
    stop_sequence: str | None
    usage: MessagesUsage
