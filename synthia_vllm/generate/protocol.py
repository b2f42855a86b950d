"""OpenAI's chat API as this server speaks it: the shapes of requests and responses.

What other requests have in common with those of chat is here, too.

A field that is known is honoured or refused. One that would change the answer and cannot be had
here is refused by name, unless its value asks for nothing (``"tools": []``; null always does). Any
other is let pass, and said: `GenerationRequest.ignored`. Responses have OpenAI's fields plus two of
vLLM's and ours: `stop_reason` in a choice, `dropped_messages` in the usage.

Source: OpenAI's API reference for chat completions; vLLM's extra sampling parameters.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    PrivateAttr,
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
MAX_STOPS: Final = 64
MAX_STOP_CHARACTERS: Final = 4096
"""Of all stops of a request together."""
MAX_TOKEN_IDS: Final = 1 << 17
MAX_BAD_WORDS: Final = 128
MAX_LOGIT_BIASES: Final = 1024
MAX_TOP_LOGPROBS: Final = 20
MAX_METADATA: Final = 16


class Shape(BaseModel):
    """An object of a request. What it does not know is kept, for `_look_at_unknown`."""

    model_config = ConfigDict(extra="allow", strict=True, frozen=True, allow_inf_nan=False)
    _ignored: tuple[str, ...] = PrivateAttr(())

    @property
    def ignored(self) -> tuple[str, ...]:
        """Of the whole request: paths of fields that changed nothing, as ``messages[].id``."""
        return self._ignored


def _whole(value: Any) -> Any:
    """16 for 16.0, which is how some languages write it."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


Int = Annotated[int, BeforeValidator(_whole)]


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


class JsonSchema(Shape):
    """The schema of `response_format`."""

    name: str | None = Field(None, max_length=64)
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

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    """vLLM's: with `include_usage`, every event has the counts so far. Benchmarks ask for it."""


StopString = Annotated[str, StringConstraints(min_length=1, max_length=256)]
BiasedToken = Annotated[str, StringConstraints(pattern=r"^[0-9]{1,9}$")]
TokenId = Annotated[int, Field(ge=0, lt=1 << 31)]
TokenIds = Annotated[list[TokenId], Field(max_length=MAX_TOKEN_IDS)]


class RepetitionDetection(Shape):
    """vLLM's: end an answer that says the same tokens again and again."""

    max_pattern_size: Int = Field(ge=1, le=1024)
    """Tokens of the longest pattern that is looked for."""
    min_pattern_size: Int | None = Field(None, ge=0, le=1024)
    min_count: Int = Field(ge=2, le=1024)
    """How often it must come."""


class GenerationRequest(Shape):
    """What requests for text have in common.

    `None` everywhere means: the server's default, which is the model card's.
    """

    model: str = Field(max_length=256)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Int | None = Field(None, ge=1, le=128)
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
    stop: StopString | Annotated[list[StopString], Field(max_length=MAX_STOPS)] | None = None
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
    return_token_ids: bool | None = None
    cache_salt: str | None = Field(None, min_length=1, max_length=256)
    logit_bias: Annotated[
        dict[BiasedToken, Annotated[float, Field(ge=-100, le=100)]] | None,
        _at_most(MAX_LOGIT_BIASES),
    ] = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    user: str | None = None
    """A label for the client's own bookkeeping; it asks nothing of the answer."""

    @property
    def own_stops(self) -> list[str]:
        """The stop strings that this request brings. Raises `InvalidRequest` for too many."""
        stops = self.stop if isinstance(self.stop, list) else [self.stop] if self.stop else []
        total = sum(map(len, stops))
        if total > MAX_STOP_CHARACTERS:
            raise InvalidRequest(
                f"`stop` has {total} characters; at most {MAX_STOP_CHARACTERS} are taken.",
                param="stop",
                code="invalid_value",
            )
        return stops


class ChatRequest(GenerationRequest):
    """The body of ``POST /v1/chat/completions``."""

    messages: list[ChatMessage] = Field(min_length=1, max_length=MAX_MESSAGES)
    max_tokens: Int | None = Field(None, ge=1)
    max_completion_tokens: Int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: Int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)
    continue_final_message: bool | None = None
    add_generation_prompt: bool | None = None
    # Labels, as `user`.
    metadata: Annotated[dict[str, str] | None, _at_most(MAX_METADATA)] = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None


# What would change the answer and is not to be had here: why not, and the values that ask for
# nothing and are let pass (null always is).
_NO_TOOLS: Final = "Synthia was not trained to call tools"
_NO_AUDIO: Final = "Synthia reads and writes text only"
_ONE_SEARCH: Final = "this server samples, and does not search for the likeliest answer"
Elsewhere = Mapping[str, tuple[str, tuple[Any, ...]]]
ELSEWHERE: Final[Elsewhere] = {
    "tools": (_NO_TOOLS, ([],)),
    "tool_choice": (_NO_TOOLS, ("none", "auto")),
    "functions": (_NO_TOOLS, ([],)),
    "function_call": (_NO_TOOLS, ("none", "auto")),
    "tool_calls": (_NO_TOOLS, ([],)),
    "tool_call_id": (_NO_TOOLS, ()),
    "audio": (_NO_AUDIO, ()),
    "modalities": (_NO_AUDIO, (["text"],)),
    "web_search_options": ("this server does not search the web", ({},)),
    "documents": ("put what is to be read into a message", ([],)),
    "best_of": ("use `n`", (1,)),
    "use_beam_search": (_ONE_SEARCH, (False,)),
    "length_penalty": (_ONE_SEARCH, (1, 1.0)),
    "structural_tag": (_NO_TOOLS, ()),
    "whitespace_pattern": ("JSON is written without white space here", ()),
    "disable_additional_properties": ("say `additionalProperties: false` in the schema", (False,)),
    "logits_processors": ("this server runs none of its clients' code", ([],)),
    "logprob_token_ids": ("ask for `top_logprobs`", ([],)),
    "thinking_token_budget": ("Synthia has no separate reasoning", (-1,)),
}
_CHAT_ELSEWHERE: Final[Elsewhere] = {
    **ELSEWHERE,
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

_MOST_IGNORED: Final = 16
"""Paths that are told; of more, that there are more."""

Parsed = TypeVar("Parsed", bound=Shape)


def parse_chat_request(body: bytes, *, refuse_unknown: bool = False) -> ChatRequest:
    """The request in `body`. Raises `InvalidRequest`, naming the field."""
    return parse(ChatRequest, body, _CHAT_ELSEWHERE, refuse_unknown=refuse_unknown)


def parse(
    shape: type[Parsed], body: bytes, elsewhere: Elsewhere, *, refuse_unknown: bool
) -> Parsed:
    """The request of this shape in `body`, with reasons for fields that are not to be had.

    Raises `InvalidRequest`, naming the field; also for one that is not known, if that is wished.
    """
    try:
        request = shape.model_validate_json(body.removeprefix(b"\xef\xbb\xbf"))
    except ValidationError as error:
        problems = error.errors(include_url=False)
    except RecursionError:
        raise InvalidRequest("The JSON is nested too deeply.") from None
    else:
        _look_at_unknown(request, elsewhere, refuse_unknown=refuse_unknown)
        return request
    # A union reports each of its members; what the user meant is the one that got furthest.
    same_field = [problem for problem in problems if problem["loc"][:1] == problems[0]["loc"][:1]]
    raise _refusal(max(same_field, key=lambda p: (len(p["loc"]), not p["type"].endswith("_type"))))


def _look_at_unknown(request: Shape, elsewhere: Elsewhere, *, refuse_unknown: bool) -> None:
    """Note what is ignored. Raises `InvalidRequest` for a field that must not be."""
    ignored: dict[str, None] = {}
    for place, part in _parts(request):
        for name, value in (part.model_extra or {}).items():
            why, neutral = elsewhere.get(name, ("no such field is known here", None))
            if value is None or (
                neutral is not None
                and any(value == ok and type(value) is type(ok) for ok in neutral)
            ):
                continue
            if neutral is None and not refuse_unknown:
                if len(ignored) < _MOST_IGNORED:
                    ignored[_shown_path(place, name)] = None
                else:
                    ignored["..."] = None
                continue
            path = f"{place}{name}"
            path = path if len(path) <= 100 else f"{path[:97]}..."
            raise InvalidRequest(
                f"`{path}` is not supported: {why}.", param=path, code="unsupported_parameter"
            )
    request._ignored = tuple(ignored)


def _shown_path(place: str, name: str) -> str:
    """A path fit for a header: without numbers, in visible ASCII, and not long."""
    path = re.sub(r"\[\d+\]", "[]", place) + name
    path = "".join(char if "!" <= char <= "~" and char != "," else "?" for char in path[:64])
    return path if len(name) <= 64 else f"{path}..."


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


def absent(value: object) -> bool:
    """Whether a field of an answer is left out, as nobody asked for it."""
    return value is None


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
    token_ids: list[int] | None = Field(None, exclude_if=absent)
    """With `return_token_ids`: all tokens that ran, those of a stop included."""


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
    prompt_token_ids: list[int] | None = Field(None, exclude_if=absent)


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
