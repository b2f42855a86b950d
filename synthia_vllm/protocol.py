"""OpenAI's chat API as this server speaks it: the shapes of requests and responses.

What other requests have in common with those of chat is here, too.

Requests are strict: no field is ignored. What the model cannot do is refused by name, unless
the value asks for nothing (``"tools": null``). Responses have OpenAI's fields plus two of
vLLM's and ours: `stop_reason` in a choice, `dropped_messages` in the usage.

Source: OpenAI's API reference for chat completions; vLLM's extra sampling parameters.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    StringConstraints,
    Tag,
    ValidationError,
)
from pydantic_core import PydanticCustomError

from synthia_vllm.errors import InvalidRequest

if TYPE_CHECKING:
    from collections.abc import Iterator

MAX_MESSAGES: Final = 4096
MAX_PARTS: Final = 1024
MAX_STOPS: Final = 16
MAX_LOGIT_BIASES: Final = 1024
MAX_TOP_LOGPROBS: Final = 20
MAX_METADATA: Final = 16


class Shape(BaseModel):
    """An object of a request; what it does not know is refused."""

    # What is not known is kept here and refused by `_refuse_unknown`, the first of it: refused by
    # pydantic, each of a hostile body's 100,000 fields would become an error object of its own.
    model_config = ConfigDict(
        extra="allow",
        strict=True,
        frozen=True,
        allow_inf_nan=False,
        json_schema_extra={"additionalProperties": False},
    )


def _at_most(limit: int) -> BeforeValidator:
    """Refuse an object of more than `limit` fields before each of them is looked at."""

    def check(value: Any) -> Any:
        if isinstance(value, dict) and len(value) > limit:
            raise PydanticCustomError("too_long", f"Object should have at most {limit} fields")
        return value

    return BeforeValidator(check)


class TextPart(Shape):
    """A piece of text in a message's content; the only kind the model reads."""

    type: Literal["text"]
    text: str


class ChatMessage(Shape):
    """One message of the conversation so far."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[
        Annotated[str, Tag("text")]
        | Annotated[list[TextPart], Field(max_length=MAX_PARTS), Tag("parts")],
        Discriminator(lambda value: "text" if isinstance(value, str) else "parts"),
    ]

    @property
    def text(self) -> str:
        """The whole content; parts are joined by newlines."""
        if isinstance(self.content, str):
            return self.content
        return "\n".join(part.text for part in self.content)


class JsonSchema(Shape):
    """The schema of `response_format`."""

    name: str = Field(max_length=64)
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    description: str | None = None
    strict: bool | None = None


class ResponseFormat(Shape):
    """What the answer must look like: any text, a JSON object, or JSON of a given schema."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class StructuredOutputs(Shape):
    """vLLM's field for the same and more: exactly one of the first five rules the answer."""

    json_: dict[str, Any] | str | None = Field(None, alias="json")
    json_object: Literal[True] | None = None
    regex: str | None = None
    choice: list[str] | None = Field(None, min_length=1)
    grammar: str | None = Field(None, min_length=1)
    disable_any_whitespace: bool | None = None
    """JSON is written without white space in any case, which both values admit."""


class StreamOptions(Shape):
    """Options of a streamed answer."""

    include_usage: bool = False
    continuous_usage_stats: bool = False
    """vLLM's: with `include_usage`, every event has the counts so far. Benchmarks ask for it."""


StopString = Annotated[str, StringConstraints(min_length=1, max_length=256)]
TokenId = Annotated[str, StringConstraints(pattern=r"^[0-9]{1,9}$")]


class GenerationRequest(Shape):
    """What requests for text have in common.

    `None` everywhere means: the server's default, which is the model card's.
    """

    model: str = Field(max_length=256)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: int | None = Field(None, ge=1, le=128)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1, le=2**31 - 1)
    min_p: float | None = Field(None, ge=0, le=1)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    repetition_penalty: float | None = Field(None, gt=0, le=10)
    seed: int | None = Field(None, ge=-(2**63), le=2**63 - 1)
    stop: StopString | Annotated[list[StopString], Field(max_length=MAX_STOPS)] | None = None
    min_tokens: int | None = Field(None, ge=0)
    ignore_eos: bool | None = None
    logit_bias: Annotated[
        dict[TokenId, Annotated[float, Field(ge=-100, le=100)]] | None,
        _at_most(MAX_LOGIT_BIASES),
    ] = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    user: str | None = None
    """A label for the client's own bookkeeping; it asks nothing of the answer."""

    @property
    def own_stops(self) -> list[str]:
        """The stop strings that this request brings."""
        return self.stop if isinstance(self.stop, list) else [self.stop] if self.stop else []


class ChatRequest(GenerationRequest):
    """The body of ``POST /v1/chat/completions``."""

    messages: list[ChatMessage] = Field(min_length=1, max_length=MAX_MESSAGES)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)
    continue_final_message: bool | None = None
    # Labels, as `user`.
    metadata: Annotated[dict[str, str] | None, _at_most(MAX_METADATA)] = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None


# What clients send although it is not to be had here: why not, and the values that ask for
# nothing and are let pass (null always is).
_NO_TOOLS: Final = "Synthia was not trained to call tools"
_NO_AUDIO: Final = "Synthia reads and writes text only"
Elsewhere = Mapping[str, tuple[str, tuple[Any, ...]]]
_ELSEWHERE: Final[Elsewhere] = {
    "tools": (_NO_TOOLS, ([],)),
    "tool_choice": (_NO_TOOLS, ("none", "auto")),
    "parallel_tool_calls": (_NO_TOOLS, (True, False)),
    "functions": (_NO_TOOLS, ([],)),
    "function_call": (_NO_TOOLS, ("none", "auto")),
    "tool_calls": (_NO_TOOLS, ([],)),
    "tool_call_id": (_NO_TOOLS, ()),
    "audio": (_NO_AUDIO, ()),
    "modalities": (_NO_AUDIO, (["text"],)),
    "annotations": ("the answers of this server have none", ([],)),
    "refusal": ("the answers of this server have none", ()),
    "name": ("Synthia's prompt has no place for a speaker's name; put it in the content", ()),
    "store": ("this server keeps no answers to be fetched later", (False,)),
    "service_tier": ("this server has one tier", ("auto", "default")),
    "reasoning_effort": ("Synthia has no separate reasoning", ("none",)),
    "verbosity": ("Synthia has no such control", ("medium",)),
    "prediction": ("this server takes no predicted output", ()),
    "web_search_options": ("this server does not search the web", ()),
    "best_of": ("use `n`", (1,)),
    "structural_tag": (_NO_TOOLS, ()),
    "whitespace_pattern": ("JSON is written without white space here", ()),
    "disable_additional_properties": ("say `additionalProperties: false` in the schema", (False,)),
    "echo": ("it belongs to completions, not to chat", (False,)),
    "chat_template": ("the prompt format is the server's, see its `format` setting", ()),
    "add_generation_prompt": ("a last message of the assistant is continued by itself", (True,)),
}


Parsed = TypeVar("Parsed", bound=Shape)


def parse_chat_request(body: bytes) -> ChatRequest:
    """The request in `body`. Raises `InvalidRequest`, naming the field."""
    return parse(ChatRequest, body, _ELSEWHERE)


def parse(shape: type[Parsed], body: bytes, elsewhere: Elsewhere) -> Parsed:
    """The request of this shape in `body`, with reasons for fields that are not to be had.

    Raises `InvalidRequest`, naming the field.
    """
    try:
        request = shape.model_validate_json(body)
    except ValidationError as error:
        problems = error.errors(include_url=False)
    except RecursionError:
        raise InvalidRequest("The JSON is nested too deeply.") from None
    else:
        _refuse_unknown(request, elsewhere)
        return request
    # A union reports each of its members; what the user meant is the one that got furthest.
    same_field = [problem for problem in problems if problem["loc"][:1] == problems[0]["loc"][:1]]
    raise _refusal(max(same_field, key=lambda p: (len(p["loc"]), not p["type"].endswith("_type"))))


def _refuse_unknown(request: Shape, elsewhere: Elsewhere) -> None:
    """Raise `InvalidRequest` for the first field that is not to be had, unless it asks nothing."""
    for place, part in _parts(request):
        for name, value in (part.model_extra or {}).items():
            why, neutral = elsewhere.get(name, ("no such field is known here", None))
            asks_nothing = neutral is not None and (
                value is None or any(value == ok and type(value) is type(ok) for ok in neutral)
            )
            if not asks_nothing:
                path = f"{place}{name}"
                path = path if len(path) <= 100 else f"{path[:97]}..."
                raise InvalidRequest(
                    f"`{path}` is not supported: {why}.", param=path, code="unsupported_parameter"
                )


def _parts(part: Shape, place: str = "") -> Iterator[tuple[str, Shape]]:
    """All objects of a request that have named fields, each with the path in front of them."""
    yield place, part
    for name, value in part.__dict__.items():
        if isinstance(value, Shape):
            yield from _parts(value, f"{place}{name}.")
        elif isinstance(value, list) and value and isinstance(value[0], Shape):
            for index, item in enumerate(value):
                yield from _parts(item, f"{place}{name}[{index}].")


def _refusal(problem: Any) -> InvalidRequest:
    """A pydantic error as an answer that names the field, the limit and the value."""
    path = _path(problem["loc"])
    kind, value = problem["type"], problem["input"]
    last = str(problem["loc"][-1]) if problem["loc"] else ""
    if kind == "json_invalid":
        return InvalidRequest(
            f"The body is not valid JSON: {problem['ctx']['error']}.", code="invalid_json"
        )
    if last == "role" and value in ("tool", "function"):
        return InvalidRequest(
            f"`{path}` is {value!r}: {_NO_TOOLS}.", param=path, code="unsupported_value"
        )
    if last == "type" and "content" in problem["loc"]:
        return InvalidRequest(
            f"`{path}` is {value!r:.60}: {_NO_AUDIO}, so every part must be of type 'text'.",
            param=path,
            code="unsupported_value",
        )
    if kind == "missing":
        return InvalidRequest(
            f"`{path}` is required.", param=path, code="missing_required_parameter"
        )
    shown = "" if isinstance(value, dict | list) else f", but it is {_short(value)}"
    return InvalidRequest(
        f"`{path or 'the body'}`: {problem['msg']}{shown}.",
        param=path or None,
        code="invalid_value",
    )


_UNIONS: Final = ("content", "stop", "prompt")


def _path(loc: tuple[int | str, ...]) -> str:
    """``messages[2].content`` of a pydantic location, without the names of union members."""
    path = ""
    for before, part in zip(("", *loc), loc, strict=False):
        if isinstance(part, int):
            path += f"[{part}]"
        elif before not in _UNIONS and part != "[key]":
            path += f".{part}" if path else part
    return path if len(path) <= 100 else f"{path[:97]}..."


def _short(value: Any) -> str:
    """A value for a message: at most 60 characters of it."""
    text = repr(value) if not isinstance(value, int) or abs(value) < 10**30 else "a huge number"
    return text if len(text) <= 60 else f"{text[:57]}..."


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


class Choice(BaseModel):
    """One answer."""

    index: int
    message: AnswerMessage
    logprobs: ChoiceLogprobs | None = None
    finish_reason: Literal["stop", "length"]
    stop_reason: int | str | None = None


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


class ChatCompletion(BaseModel):
    """The body of a plain answer."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[Choice]
    usage: Usage


class ModelCard(BaseModel):
    """One name in the list of models."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str
    root: str
    max_model_len: int | None


class ModelList(BaseModel):
    """The body of ``GET /v1/models``."""

    object: Literal["list"] = "list"
    data: list[ModelCard]
