"""What requests for text have in common, whichever route they come by.

A field that is known is honoured or refused. One that would change the answer and cannot be had
here is refused by name, unless its value asks for nothing (``"tools": []``; null always does). Any
other is let pass, and said: `RequestBody.ignored`. `parse` holds requests to that.

Source: OpenAI's API reference; vLLM's extra sampling parameters.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Final, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PrivateAttr,
    StringConstraints,
)
from pydantic_core import PydanticCustomError

from synthia_vllm.errors import InvalidRequest

MAX_MESSAGES: Final = 4096
"""Of a conversation."""
MAX_PARTS: Final = 1024
"""Of a message's content."""
MAX_METADATA: Final = 16
MAX_STOPS: Final = 64
MAX_STOP_CHARACTERS: Final = 4096
"""Of all stops of a request together."""
MAX_TOKEN_IDS: Final = 1 << 17
MAX_BAD_WORDS: Final = 128
MAX_LOGIT_BIASES: Final = 1024
MAX_TOP_LOGPROBS: Final = 20

Unsupported = Mapping[str, tuple[str, tuple[Any, ...]]]
"""By field: why it cannot be had here, and the values that ask for nothing and are let pass."""

NO_TOOLS: Final = "Synthia was not trained to call tools"
TEXT_ONLY: Final = "Synthia reads and writes text only"
_ONE_SEARCH: Final = "this server samples, and does not search for the likeliest answer"
UNSUPPORTED: Final[Unsupported] = {
    "tools": (NO_TOOLS, ([],)),
    "tool_choice": (NO_TOOLS, ("none", "auto")),
    "functions": (NO_TOOLS, ([],)),
    "function_call": (NO_TOOLS, ("none", "auto")),
    "tool_calls": (NO_TOOLS, ([],)),
    "tool_call_id": (NO_TOOLS, ()),
    "audio": (TEXT_ONLY, ()),
    "modalities": (TEXT_ONLY, (["text"],)),
    "web_search_options": ("this server does not search the web", ({},)),
    "documents": ("put what is to be read into a message", ([],)),
    "best_of": ("use `n`", (1,)),
    "use_beam_search": (_ONE_SEARCH, (False,)),
    "length_penalty": (_ONE_SEARCH, (1, 1.0)),
    "structural_tag": (NO_TOOLS, ()),
    "whitespace_pattern": ("JSON is written without white space here", ()),
    "disable_additional_properties": ("say `additionalProperties: false` in the schema", (False,)),
    "logits_processors": ("this server runs none of its clients' code", ([],)),
    "logprob_token_ids": ("ask for `top_logprobs`", ([],)),
    "thinking_token_budget": ("Synthia has no separate reasoning", (-1,)),
}


class StrictModel(BaseModel):
    """An object of a request. What it does not know is kept, for `parse` to look at."""

    model_config = ConfigDict(extra="allow", strict=True, frozen=True, allow_inf_nan=False)


class RequestBody(StrictModel):
    """A whole request."""

    unsupported: ClassVar[Unsupported] = {}
    """The fields at any depth that are refused by name."""
    _ignored: tuple[str, ...] = PrivateAttr(())

    @property
    def ignored(self) -> tuple[str, ...]:
        """Paths of fields that changed nothing, as ``messages[].id``."""
        return self._ignored


def _whole(value: Any) -> Any:
    """16 for 16.0, which is how some languages write it."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


Int = Annotated[int, BeforeValidator(_whole)]


def at_most(limit: int) -> BeforeValidator:
    """Refuse an object of more than `limit` fields before each of them is looked at."""

    def check(value: Any) -> Any:
        if isinstance(value, dict) and len(value) > limit:
            raise PydanticCustomError("too_long", f"Object should have at most {limit} fields")
        return value

    return BeforeValidator(check)


class JsonSchema(StrictModel):
    """The schema of `response_format`."""

    name: str | None = Field(None, max_length=64)
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    description: str | None = None
    strict: bool | None = None


class ResponseFormat(StrictModel):
    """What the answer must look like: any text, a JSON object, or JSON of a given schema."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class StructuredOutputs(StrictModel):
    """vLLM's field for the same and more: exactly one of the first five rules the answer."""

    json_: dict[str, Any] | str | None = Field(None, alias="json")
    json_object: Literal[True] | None = None
    regex: str | None = None
    choice: list[str] | None = Field(None, min_length=1)
    grammar: str | None = Field(None, min_length=1)
    disable_any_whitespace: bool | None = None
    """JSON is written without white space in any case, which both values admit."""


class StreamOptions(StrictModel):
    """Options of a streamed answer."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    """vLLM's: with `include_usage`, every event has the counts so far. Benchmarks ask for it."""


UsageEvents = Literal["never", "last", "each"]
"""Which events of a stream have the token counts."""

StopString = Annotated[str, StringConstraints(min_length=1, max_length=256)]
BiasedToken = Annotated[str, StringConstraints(pattern=r"^[0-9]{1,9}$")]
TokenId = Annotated[int, Field(ge=0, lt=1 << 31)]
TokenIds = Annotated[list[TokenId], Field(max_length=MAX_TOKEN_IDS)]


class RepetitionDetection(StrictModel):
    """vLLM's: end an answer that says the same tokens again and again."""

    max_pattern_size: Int = Field(ge=1, le=1024)
    """Tokens of the longest pattern that is looked for."""
    min_pattern_size: Int | None = Field(None, ge=0, le=1024)
    min_count: Int = Field(ge=2, le=1024)
    """How often it must come."""


class SamplingRequest(RequestBody):
    """What all requests for text have in common: how tokens are chosen.

    `None` everywhere means: the server's default, which is the model card's.
    """

    model: str = Field(max_length=256)
    stream: bool | None = None
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: Int | None = Field(None, ge=-1, le=2**31 - 1)
    min_p: float | None = Field(None, ge=0, le=1)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    repetition_penalty: float | None = Field(None, gt=0, le=10)
    repeat_penalty: float | None = Field(None, gt=0, le=10)
    """llama.cpp's name for the same."""
    seed: Int | None = Field(None, ge=-(2**63), le=2**63 - 1)
    stop_token_ids: TokenIds | None = None
    bad_words: list[StopString] | None = Field(None, max_length=MAX_BAD_WORDS)
    allowed_token_ids: TokenIds | None = Field(None, min_length=1)
    min_tokens: Int | None = Field(None, ge=0)
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    spaces_between_special_tokens: bool | None = None
    repetition_detection: RepetitionDetection | None = None
    stream_interval: Int | None = Field(None, ge=1, le=1024)
    """Tokens to an event of a stream, after the first."""
    cache_salt: str | None = Field(None, min_length=1, max_length=256)
    logit_bias: Annotated[
        dict[BiasedToken, Annotated[float, Field(ge=-100, le=100)]] | None,
        at_most(MAX_LOGIT_BIASES),
    ] = None

    @property
    def answers(self) -> int:
        """How many are asked for."""
        return 1

    @property
    def own_stops(self) -> list[str]:
        """The stop strings that this request brings. Raises `InvalidRequest` for too many."""
        return []

    @property
    def usage_events(self) -> UsageEvents:
        """Which events of a stream have token counts. Raises `InvalidRequest`."""
        return "never"

    @property
    def show_token_ids(self) -> bool:
        """Whether the client wants the tokens themselves, too."""
        return False


def few_stops(stops: list[str], param: str) -> list[str]:
    """`stops`, which the field `param` has. Raises `InvalidRequest` if they are too long."""
    total = sum(map(len, stops))
    if total > MAX_STOP_CHARACTERS:
        raise InvalidRequest(
            f"`{param}` has {total} characters; at most {MAX_STOP_CHARACTERS} are taken.",
            param=param,
            code="invalid_value",
        )
    return stops


class GenerationRequest(SamplingRequest):
    """What OpenAI's chat and completions have in common besides."""

    unsupported = UNSUPPORTED

    stream_options: StreamOptions | None = None
    n: Int | None = Field(None, ge=1, le=128)
    stop: StopString | Annotated[list[StopString], Field(max_length=MAX_STOPS)] | None = None
    return_token_ids: bool | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    user: str | None = None
    """A label for the client's own bookkeeping; it asks nothing of the answer."""

    @property
    def answers(self) -> int:
        return self.n or 1

    @property
    def own_stops(self) -> list[str]:
        stops = self.stop if isinstance(self.stop, list) else [self.stop] if self.stop else []
        return few_stops(stops, "stop")

    @property
    def usage_events(self) -> UsageEvents:
        options = self.stream_options
        if options is None:
            return "never"
        if not self.stream:
            raise InvalidRequest(
                "`stream_options` needs `stream: true`.",
                param="stream_options",
                code="invalid_value",
            )
        if not options.include_usage:
            return "never"
        return "each" if options.continuous_usage_stats else "last"

    @property
    def show_token_ids(self) -> bool:
        return bool(self.return_token_ids)


def absent(value: object) -> bool:
    """Whether a field of an answer is left out, as nobody asked for it."""
    return value is None


class PromptTokensDetails(BaseModel):
    """What became of the prompt."""

    cached_tokens: int
    dropped_messages: int = 0


class Usage(BaseModel):
    """Tokens that ran."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
