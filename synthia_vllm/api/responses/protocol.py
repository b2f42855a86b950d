"""OpenAI's Responses API as this server speaks it: text only, and nothing is stored.

Source: OpenAI's API reference for responses, and the types of its Python SDK.
"""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, BeforeValidator, Discriminator, Field, StringConstraints, Tag
from pydantic_core import PydanticCustomError

from synthia_vllm.generate.parse import UNSUPPORTED_VALUE
from synthia_vllm.generate.protocol import (
    MAX_MESSAGES,
    MAX_METADATA,
    MAX_PARTS,
    MAX_TOP_LOGPROBS,
    NO_TOOLS,
    TEXT_ONLY,
    UNSUPPORTED,
    Int,
    SamplingRequest,
    StrictModel,
    Unsupported,
    absent,
    at_most,
)

LOGPROBS: Final = "message.output_text.logprobs"

_STATELESS: Final = "nothing is stored here: send the whole conversation as `input`"
_OF_CHAT: Final = "this API has no such field; /v1/chat/completions has"
_UNSUPPORTED: Final[Unsupported] = {
    **UNSUPPORTED,
    "max_tool_calls": (NO_TOOLS, ()),
    "previous_response_id": (_STATELESS, ()),
    "conversation": (_STATELESS, ()),
    "background": (_STATELESS + ", and wait for the answer, or have it streamed", (False,)),
    "prompt": ("no templates are stored here: send `input`", ()),
    "context_management": ('`truncation: "auto"` drops the oldest exchanges', ([],)),
    "moderation": ("this server judges no texts", ()),
    "messages": ("it is called `input` here", ()),
    "max_tokens": ("it is called `max_output_tokens` here", ()),
    "max_completion_tokens": ("it is called `max_output_tokens` here", ()),
    "response_format": ("it is called `text.format` here", ({"type": "text"},)),
    "logprobs": (f'ask for `include: ["{LOGPROBS}"]`', (False,)),
    "n": (_OF_CHAT, (1,)),
    "stop": (_OF_CHAT, ([],)),
    "structured_outputs": (_OF_CHAT + ", `text.format` takes JSON schemas", ()),
    "return_token_ids": (_OF_CHAT, (False,)),
    "continue_final_message": ("a last message of the assistant is continued", (True, False)),
    "add_generation_prompt": ("a last message of the assistant is continued", (True, False)),
}

_WHY_NOT: Final = {
    "item_reference": "nothing is stored here; send the item itself, as clients do that are told "
    "`store: false`",
    "reasoning": "Synthia has no separate reasoning",
}


def _message(value: Any) -> Any:
    if isinstance(value, str) and value != "message":
        a_tools = value.endswith(("_call", "_output")) or value.startswith("mcp_")
        why = NO_TOOLS if a_tools else "every item must be of type 'message'"
        raise PydanticCustomError(UNSUPPORTED_VALUE, _WHY_NOT.get(value, why))
    return value


def _text(value: Any) -> Any:
    if isinstance(value, str) and value not in ("input_text", "output_text", "text"):
        raise PydanticCustomError(
            UNSUPPORTED_VALUE,
            TEXT_ONLY + ", so every part must be of type 'input_text' or 'output_text'",
        )
    return value


class ContentText(StrictModel):
    """A piece of text in an item's content, also one that comes back from an earlier answer."""

    type: Annotated[Literal["input_text", "output_text", "text"], BeforeValidator(_text)]
    text: str
    annotations: list[Any] | None = None
    logprobs: list[Any] | None = None


class InputItem(StrictModel):
    """One message of the conversation so far, also one that comes back from `output`."""

    type: Annotated[Literal["message"] | None, BeforeValidator(_message)] = None
    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[
        Annotated[str, Tag("text")]
        | Annotated[list[ContentText], Field(max_length=MAX_PARTS), Tag("parts")],
        Discriminator(lambda value: "text" if isinstance(value, str) else "parts"),
    ]
    id: str | None = None
    status: str | None = None
    phase: str | None = None

    @property
    def content_text(self) -> str:
        """The whole content; parts are joined by newlines."""
        if isinstance(self.content, str):
            return self.content
        return "\n".join(part.text for part in self.content)


class TextFormat(StrictModel):
    """What the answer must look like: any text, a JSON object, or JSON of a given schema."""

    type: Literal["text", "json_object", "json_schema"]
    name: str | None = Field(None, max_length=64)
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    description: str | None = None
    strict: bool | None = None


class TextOptions(StrictModel):
    """What is asked of the answer's text."""

    format: TextFormat | None = None


class ObfuscationOptions(StrictModel):
    """Options of a streamed answer; events are never padded here."""

    include_obfuscation: bool | None = None


Includable = Literal[
    "message.output_text.logprobs",
    "message.input_image.image_url",
    "reasoning.encrypted_content",
    "web_search_call.results",
    "web_search_call.action.sources",
    "file_search_call.results",
    "code_interpreter_call.outputs",
    "computer_call_output.output.image_url",
]
# They go back to the client with every answer, up to three times in a stream.
Label = Annotated[str, StringConstraints(max_length=512)]
LabelName = Annotated[str, StringConstraints(max_length=64)]


class ResponsesRequest(SamplingRequest):
    """The body of ``POST /v1/responses``."""

    unsupported = _UNSUPPORTED

    input: Annotated[
        Annotated[str, Tag("text")]
        | Annotated[list[InputItem], Field(min_length=1, max_length=MAX_MESSAGES), Tag("items")],
        Discriminator(lambda value: "text" if isinstance(value, str) else "items"),
    ]
    instructions: str | None = None
    """A system message in front of all others."""
    max_output_tokens: Int | None = Field(None, ge=1)
    text: TextOptions | None = None
    include: list[Includable] | None = Field(None, max_length=64)
    top_logprobs: Int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)
    truncation: Literal["auto", "disabled"] | None = None
    stream_options: ObfuscationOptions | None = None
    store: bool | None = None
    """Nothing is stored in any case, and the answer says so."""
    # Labels of the client's own, which it gets back.
    metadata: Annotated[dict[LabelName, Label] | None, at_most(MAX_METADATA)] = None
    user: Label | None = None
    safety_identifier: Label | None = None
    prompt_cache_key: Label | None = None

    @property
    def ignored(self) -> tuple[str, ...]:
        """Also what is not there to be included."""
        more = dict.fromkeys(f"include.{name}" for name in self.include or () if name != LOGPROBS)
        return (*super().ignored, *more)

    @property
    def items(self) -> list[InputItem]:
        """The conversation; a text is a message of the user's."""
        if isinstance(self.input, str):
            return [InputItem(role="user", content=self.input)]
        return self.input

    @property
    def wanted_logprobs(self) -> int | None:
        """How many at each place; `None` for none at all."""
        return (self.top_logprobs or 0) if LOGPROBS in (self.include or ()) else None


class OutputText(BaseModel):
    """The answer's text."""

    type: Literal["output_text"] = "output_text"
    annotations: list[Any] = []
    logprobs: list[dict[str, Any]] = []
    """A token at a time, where they are asked for."""
    text: str


Status = Literal["in_progress", "completed", "incomplete"]


class OutputMessage(BaseModel):
    """The assistant's message."""

    id: str
    type: Literal["message"] = "message"
    status: Status
    role: Literal["assistant"] = "assistant"
    content: list[OutputText]


class InputTokensDetails(BaseModel):
    """What became of the prompt."""

    cached_tokens: int
    cache_write_tokens: int = 0
    """Nobody is charged for what the prefix cache keeps."""
    dropped_messages: int = 0


class OutputTokensDetails(BaseModel):
    """What the answer's tokens were for."""

    reasoning_tokens: int = 0


class ResponsesUsage(BaseModel):
    """Tokens that ran."""

    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    output_tokens_details: OutputTokensDetails = OutputTokensDetails()
    total_tokens: int


class ResponseError(BaseModel):
    """Why there is no whole answer, in OpenAI's closed set of codes."""

    code: Literal["server_error", "rate_limit_exceeded", "invalid_prompt"]
    message: str
    param: str | None
    type: str


class IncompleteDetails(BaseModel):
    """Why the answer stopped short."""

    reason: Literal["max_output_tokens"] = "max_output_tokens"


class FormatTold(BaseModel):
    """The format that was asked for."""

    type: Literal["text", "json_object", "json_schema"] = "text"
    name: str | None = Field(None, exclude_if=absent)
    schema_: dict[str, Any] | None = Field(None, serialization_alias="schema", exclude_if=absent)
    description: str | None = Field(None, exclude_if=absent)
    strict: bool | None = Field(None, exclude_if=absent)


class TextTold(BaseModel):
    """What was asked of the text."""

    format: FormatTold


class ReasoningTold(BaseModel):
    """Synthia has no separate reasoning."""

    effort: None = None
    summary: None = None


class ResponseObject(BaseModel):
    """The body of a plain answer; in a stream, its state at the beginning and at the end."""

    id: str
    object: Literal["response"] = "response"
    created_at: int
    status: Literal["in_progress", "completed", "incomplete", "failed"]
    background: Literal[False] = False
    completed_at: int | None
    error: ResponseError | None
    frequency_penalty: float
    incomplete_details: IncompleteDetails | None
    instructions: str | None
    max_output_tokens: int | None
    max_tool_calls: None = None
    model: str
    output: list[OutputMessage]
    parallel_tool_calls: Literal[False] = False
    presence_penalty: float
    previous_response_id: None = None
    prompt_cache_key: str | None
    reasoning: ReasoningTold = ReasoningTold()
    safety_identifier: str | None
    service_tier: None = None
    store: Literal[False] = False
    temperature: float
    text: TextTold
    tool_choice: Literal["none"] = "none"
    tools: list[Any] = []
    top_logprobs: int
    top_p: float
    truncation: Literal["auto", "disabled"]
    usage: ResponsesUsage | None
    user: str | None
    metadata: dict[str, str]
