"""One chat request, from what the client asked to what it gets.

    prepare: messages -> prompt -> tokens -> budget -> work for the engine
    Reply:   what the engine says -> the answer, choice by choice

Both the streamed and the plain answer go through `Reply`, so they cannot differ.
"""

from __future__ import annotations

import codecs
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from synthia_vllm.answer import AnswerFilter
from synthia_vllm.engine import Sampling, Work
from synthia_vllm.errors import (
    ContextOverflow,
    EngineFault,
    Forbidden,
    InvalidRequest,
    UnknownModel,
)
from synthia_vllm.prompt import (
    TURN_STOP,
    Markers,
    Message,
    drop_exchanges,
    exchange_starts,
    render,
    tidy,
)
from synthia_vllm.protocol import PromptTokensDetails, Usage

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from synthia_vllm.engine import Engine, Output, TokenLogprob
    from synthia_vllm.protocol import ChatRequest
    from synthia_vllm.settings import Settings
    from synthia_vllm.tenants import Place

# JSON has no infinity; OpenAI writes this for a token that cannot be.
_LEAST_LOGPROB: Final = -9999.0

# vLLM's grammar compiler (xgrammar 0.2) took 1.1 s for 1,000 properties of one object, over 20 s
# for 5,000, and 2.3 s for 10,000 enum values; repeats, ranges and patterns made it no slower.
_MAX_SCHEMA_ENTRIES: Final = 3000
_MAX_SCHEMA_TEXT: Final = 120_000


@dataclass(frozen=True, slots=True)
class Prepared:
    """A request that is valid, tokenised, and fits the context."""

    work: Work
    model: str
    """The served name the client asked for."""
    stream: bool
    include_usage: bool
    top_logprobs: int
    continued: bool
    """The client sent the beginning of the answer."""
    escaped_markers: int
    dropped_messages: int
    question: str
    """What the user said last, as it was sent."""


async def prepare(
    request: ChatRequest,
    engine: Engine,
    settings: Settings,
    request_id: str,
    place: Place,
    *,
    trace_headers: Mapping[str, str] | None = None,
) -> Prepared:
    """All that is decided before the engine sees the request.

    Raises `InvalidRequest`, and whatever `Place.claim` raises.
    """
    served = settings.served
    if request.model not in served:
        raise UnknownModel(request.model, tuple(served))
    if place.user.models is not None and request.model not in place.user.models:
        raise Forbidden(
            f"You may not use {request.model}. Yours: {', '.join(sorted(place.user.models))}.",
            param="model",
            code="model_not_allowed",
        )
    preset = served[request.model]
    messages, escaped = tidy(
        [Message("system" if m.role == "developer" else m.role, m.text) for m in request.messages],
        settings.markers,
        preset.system if preset else None,
    )
    continued = messages[-1].role == "assistant" if messages else False
    if request.continue_final_message is not None and request.continue_final_message != continued:
        raise InvalidRequest(
            "`continue_final_message` is true exactly if the last message is the assistant's: "
            "such a message is always continued here, any other is answered.",
            param="continue_final_message",
            code="invalid_value",
        )
    asked = _max_tokens(request, settings, place.user.max_tokens)
    token_ids, dropped = await _fit(messages, asked, engine, settings)
    room = engine.traits.max_model_len - len(token_ids)
    sampling = _sampling(request, settings, engine, min(asked, room))
    return Prepared(
        work=Work(
            request_id=request_id,
            prompt_token_ids=token_ids,
            sampling=sampling,
            # With `min_tokens` the engine runs past the answer's end; seeing each step, we end it.
            deltas=bool(request.stream) or sampling.min_tokens > 0,
            priority=await place.claim(len(token_ids), sampling.max_tokens, sampling.n),
            trace_headers=trace_headers,
        ),
        model=request.model,
        stream=bool(request.stream),
        include_usage=bool(request.stream_options and request.stream_options.include_usage),
        top_logprobs=request.top_logprobs or 0,
        continued=continued and bool(messages[-1].content),
        escaped_markers=escaped,
        dropped_messages=dropped,
        question=next((m.text for m in reversed(request.messages) if m.role == "user"), ""),
    )


async def _fit(
    messages: Sequence[Message], max_tokens: int, engine: Engine, settings: Settings
) -> tuple[list[int], int]:
    """The prompt's tokens, with as few of the oldest exchanges dropped as it takes to fit.

    Also returns the number of messages dropped. An answer needs one token; where exchanges may
    be dropped it gets room for `answer_reserve`, so that a long conversation is not answered in
    a word.
    """
    context = engine.traits.max_model_len
    # A longer text has more tokens than fit, whatever it says: the rest need not be counted.
    longest = (context + 1) * engine.traits.longest_token
    counted_all = True

    async def tokens_from(start: int) -> list[int]:
        nonlocal counted_all
        text = render(drop_exchanges(messages, start)[0], settings.format)
        counted_all = len(text) <= longest
        return await engine.tokenize(
            text[:longest], special_tokens=settings.markers is Markers.ALLOW
        )

    token_ids = await tokens_from(0)
    may_drop = settings.overflow == "drop-oldest"
    reserve = min(max_tokens, settings.answer_reserve) if may_drop else 1
    if len(token_ids) + reserve <= context:
        return token_ids, 0
    starts = exchange_starts(messages) if may_drop else []
    # The fewest exchanges to drop: longer prompts do not fit, shorter ones do.
    low, high = 1, len(starts)
    fitting: list[int] | None = None
    while low < high:
        middle = (low + high) // 2
        shorter = await tokens_from(starts[middle])
        if len(shorter) + reserve <= context:
            fitting, high = shorter, middle
        else:
            low = middle + 1
    if fitting is not None:
        return fitting, drop_exchanges(messages, starts[high])[1]
    if len(starts) > 1:
        shortest = await tokens_from(starts[-1])
        if len(shortest) < context:  # less room than we would like beats no answer
            return shortest, drop_exchanges(messages, starts[-1])[1]
        token_ids = shortest
    elif len(token_ids) < context:
        return token_ids, 0
    raise ContextOverflow(
        f"This model's context holds {context} tokens, prompt and answer together. Your messages "
        f"are {'' if counted_all else 'at least '}{len(token_ids)} tokens"
        + (" after dropping all that may be dropped" if len(starts) > 1 else "")
        + ", which leaves no room for an answer. Shorten the messages."
    )


def _max_tokens(request: ChatRequest, settings: Settings, ceiling: int | None) -> int:
    old, new = request.max_tokens, request.max_completion_tokens
    if old is not None and new is not None and old != new:
        raise InvalidRequest(
            f"`max_tokens` ({old}) and `max_completion_tokens` ({new}) mean the same; send one.",
            param="max_tokens",
            code="invalid_value",
        )
    asked = new or old
    if ceiling is None:
        return asked or settings.sampling.max_tokens
    if asked is not None and asked > ceiling:
        raise InvalidRequest(
            f"`max_tokens` is {asked}; you may have at most {ceiling} tokens in an answer.",
            param="max_tokens",
            code="invalid_value",
        )
    return asked or min(settings.sampling.max_tokens, ceiling)


def _sampling(
    request: ChatRequest, settings: Settings, engine: Engine, max_tokens: int
) -> Sampling:
    """The engine's parameters: what the request says, else the server's defaults."""
    defaults = settings.sampling

    def or_default(value: Any, default: Any) -> Any:
        return default if value is None else value

    n = request.n or 1
    temperature = or_default(request.temperature, defaults.temperature)
    if n > settings.limits.max_n:
        raise InvalidRequest(
            f"`n` is {n}; this server gives at most {settings.limits.max_n} answers at once.",
            param="n",
            code="invalid_value",
        )
    if n > 1 and temperature == 0:
        raise InvalidRequest(
            "`n` must be 1 at temperature 0: all answers would be the same.",
            param="n",
            code="invalid_value",
        )
    if request.top_logprobs and not request.logprobs:
        raise InvalidRequest(
            "`top_logprobs` needs `logprobs: true`.", param="top_logprobs", code="invalid_value"
        )
    if request.stream_options is not None and not request.stream:
        raise InvalidRequest(
            "`stream_options` needs `stream: true`.", param="stream_options", code="invalid_value"
        )
    min_tokens = request.min_tokens or 0
    if min_tokens > max_tokens:
        raise InvalidRequest(
            f"`min_tokens` is {min_tokens}, but the answer can have at most {max_tokens} tokens.",
            param="min_tokens",
            code="invalid_value",
        )
    own = request.stop if isinstance(request.stop, list) else [request.stop] if request.stop else []
    return Sampling(
        max_tokens=max_tokens,
        n=n,
        temperature=temperature,
        top_p=or_default(request.top_p, defaults.top_p),
        top_k=or_default(request.top_k, defaults.top_k),
        min_p=or_default(request.min_p, defaults.min_p),
        presence_penalty=or_default(request.presence_penalty, 0.0),
        frequency_penalty=or_default(request.frequency_penalty, 0.0),
        repetition_penalty=or_default(request.repetition_penalty, defaults.repetition_penalty),
        seed=request.seed,
        stop=(TURN_STOP, *own),
        min_tokens=min_tokens,
        ignore_eos=bool(request.ignore_eos),
        logprobs=(request.top_logprobs or 0) if request.logprobs else None,
        logit_bias=_logit_bias(request.logit_bias, engine.traits.vocab_size),
        json_schema=_json_schema(request),
    )


def _logit_bias(asked: Mapping[str, float] | None, vocab_size: int) -> dict[int, float] | None:
    if not asked:
        return None
    bias = {int(token): value for token, value in asked.items()}
    largest = max(bias)
    if largest >= vocab_size:
        raise InvalidRequest(
            f"`logit_bias` names token {largest}; the model has {vocab_size} tokens, from 0.",
            param="logit_bias",
            code="invalid_value",
        )
    return bias


def _json_schema(request: ChatRequest) -> dict[str, Any] | None:
    wanted = request.response_format
    if wanted is None or wanted.type == "text":
        return None
    if wanted.type == "json_object":
        return {}
    if wanted.json_schema is None:
        raise InvalidRequest(
            "`response_format.json_schema` is required with type 'json_schema'.",
            param="response_format.json_schema",
            code="missing_required_parameter",
        )
    schema = wanted.json_schema.schema_
    _check_size(schema)
    return schema


def _check_size(schema: Mapping[str, Any]) -> None:
    """Raise `InvalidRequest` for a schema too large to be compiled in a second or two."""
    entries = text = 0
    rest: list[Any] = [schema]
    while rest:
        value = rest.pop()
        if isinstance(value, str):
            text += len(value)
        elif isinstance(value, dict | list):
            entries += len(value)
            rest += value
            if isinstance(value, dict):
                rest += value.values()
        if entries > _MAX_SCHEMA_ENTRIES or text > _MAX_SCHEMA_TEXT:
            raise InvalidRequest(
                f"The JSON schema is too large: at most {_MAX_SCHEMA_ENTRIES} entries (of objects "
                f"and lists, at all depths) and {_MAX_SCHEMA_TEXT} characters are taken.",
                param="response_format.json_schema.schema",
                code="invalid_value",
            )


class Piece(NamedTuple):
    """What one output, or several in a row, add to one choice's answer."""

    choice: int
    """Which of the `n`, from 0."""
    text: str
    logprobs: list[dict[str, Any]] | None
    finish_reason: str | None
    """``stop`` or ``length`` with the last piece of the choice."""
    stop_reason: int | str | None

    def then(self, more: Piece) -> Piece:
        """Both pieces as one."""
        logprobs = self.logprobs
        if logprobs is not None or more.logprobs is not None:
            logprobs = [*(logprobs or ()), *(more.logprobs or ())]
        return Piece(
            self.choice, self.text + more.text, logprobs, more.finish_reason, more.stop_reason
        )


class Reply:
    """The answers to one prepared request while they arrive, and the tokens they took."""

    __slots__ = (
        "_choices",
        "_on_begin",
        "_prepared",
        "_texts",
        "answer_tokens",
        "began_at",
        "cached_tokens",
        "finish_reasons",
        "open_choices",
    )

    def __init__(
        self,
        prepared: Prepared,
        engine: Engine,
        *,
        began: Callable[[], None] = lambda: None,
        keep_text: bool = False,
    ) -> None:
        own_stops = prepared.work.sampling.stop[1:]
        self._prepared = prepared
        self._choices = [
            _Choice(
                AnswerFilter(own_stops, continued=prepared.continued),
                _Places(engine, prepared.top_logprobs)
                if prepared.work.sampling.logprobs is not None
                else None,
            )
            for _ in range(prepared.work.sampling.n)
        ]
        self._on_begin = began
        self._texts: list[list[str]] | None = None
        if keep_text:
            self._texts = [[] for _ in range(prepared.work.sampling.n)]
        self.began_at: float | None = None
        """When the first of the answer came, which is when the prompt had run."""
        self.answer_tokens = 0
        self.finish_reasons: list[str] = []
        """One for each choice that has ended."""
        self.cached_tokens = 0
        self.open_choices = prepared.work.sampling.n
        """Choices whose end has not come; at 0 the engine need not go on."""

    def take(self, output: Output, cached_tokens: int) -> Piece | None:
        """What `output` adds to its choice's answer, if anything. Raises `EngineFault`."""
        if self.began_at is None:
            self.began_at = time.perf_counter()
            self.cached_tokens = cached_tokens
            self._on_begin()
        self.answer_tokens += len(output.token_ids)
        choice = self._choices[output.index]
        if choice.over:
            return None
        answer = choice.answer
        reason, stop = output.finish_reason, output.stop_reason
        if reason is None:
            text = answer.feed(output.text)
            if answer.ended:  # the marker, where the engine was told to look away
                reason, stop = "stop", TURN_STOP
        elif reason in ("stop", "length"):
            text = answer.finish(output.text, stop if isinstance(stop, str) else None)
        else:
            raise EngineFault
        if reason is not None:
            choice.over = True
            self.open_choices -= 1
            self.finish_reasons.append(reason)
        logprobs = None
        if choice.places is not None:
            choice.sent += len(text)
            choice.places.add(output)
            logprobs = choice.places.up_to(answer.skipped, choice.sent)
        elif not text and reason is None:
            return None
        if self._texts is not None:
            self._texts[output.index].append(text)
        return Piece(output.index, text, logprobs, reason, stop)

    @property
    def texts(self) -> list[str]:
        """The answers so far, if they are kept."""
        return ["".join(pieces) for pieces in self._texts or ()]

    def usage(self) -> Usage:
        """Counts of the tokens that ran."""
        prompt = len(self._prepared.work.prompt_token_ids)
        return Usage(
            prompt_tokens=prompt,
            completion_tokens=self.answer_tokens,
            total_tokens=prompt + self.answer_tokens,
            prompt_tokens_details=PromptTokensDetails(
                cached_tokens=self.cached_tokens,
                dropped_messages=self._prepared.dropped_messages,
            ),
        )


@dataclass(slots=True)
class _Choice:
    answer: AnswerFilter
    places: _Places | None
    sent: int = 0
    """Characters of the answer that went out."""
    over: bool = False


class _Places:
    """The log-probabilities of one choice, held until their token's text is part of the answer.

    A token of a stop string, of the next turn's marker, or of white space around the answer is
    never reported: it is not in the answer.
    """

    __slots__ = ("_decoder", "_end", "_engine", "_top", "_waiting")

    def __init__(self, engine: Engine, top: int) -> None:
        self._engine = engine
        self._top = top
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._end = 0
        self._waiting: list[tuple[int, dict[str, Any]]] = []

    def add(self, output: Output) -> None:
        """Note the tokens of `output` with the place in the raw text where each ends."""
        for token_id, place in zip(output.token_ids, output.logprobs or (), strict=False):
            data = self._engine.token_bytes(token_id)
            if not data:  # a special token has no text
                continue
            text = self._decoder.decode(data)
            self._end += len(text)
            # Part of a character counts as reaching the end of that character.
            end = self._end + (0 if text else 1)
            self._waiting.append((end, self._entry(token_id, data, place)))

    def up_to(self, skipped: int, sent: int) -> list[dict[str, Any]]:
        """Let go of the tokens whose text lies within the first `sent` characters of the answer."""
        ready = [entry for end, entry in self._waiting if skipped < end <= skipped + sent]
        self._waiting = [(end, entry) for end, entry in self._waiting if end > skipped + sent]
        return ready

    def _entry(
        self, token_id: int, data: bytes, place: Mapping[int, TokenLogprob]
    ) -> dict[str, Any]:
        likely = sorted(place.items(), key=lambda item: -item[1].logprob)[: self._top]
        return {
            **self._token(data, place[token_id].logprob),
            "top_logprobs": [
                self._token(self._engine.token_bytes(other), value.logprob)
                for other, value in likely
            ],
        }

    @staticmethod
    def _token(data: bytes, logprob: float) -> dict[str, Any]:
        return {
            "token": data.decode(errors="replace"),
            "logprob": max(logprob, _LEAST_LOGPROB),
            "bytes": list(data),
        }
