"""One chat request, from what the client asked to what it gets.

compose: messages -> prompt -> tokens -> budget
prepare: all of that, claimed -> work for the engine
_Answer: what the engine says -> the answer, by the card's rule
"""

from __future__ import annotations

import codecs
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from synthia_vllm.engine.base import Work
from synthia_vllm.errors import ContextOverflow, EngineFault, GrammarTooComplex, InvalidRequest
from synthia_vllm.generate.response import Piece, Prepared, WithTokens, wanted_usage
from synthia_vllm.generate.sampling import (
    answer_limit,
    grammar_of,
    preset_of,
    require_possible,
    sampling_of,
)
from synthia_vllm.template.answer import AnswerFilter, GrammarFilter
from synthia_vllm.template.prompt import (
    TURN_STOP,
    Markers,
    Message,
    drop_exchanges,
    exchange_starts,
    render,
    tidy,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from synthia_vllm.admission.tenants import Place, User
    from synthia_vllm.engine.base import Engine, Output, Sampling, TokenLogprob
    from synthia_vllm.generate.protocol import ChatRequest
    from synthia_vllm.generate.response import Choice
    from synthia_vllm.settings import Settings

# JSON has no infinity; OpenAI writes this for a token that cannot be.
LEAST_LOGPROB: Final = -9999.0


@dataclass(frozen=True, slots=True)
class Composed:
    """What the model will be asked."""

    text: str
    """The prompt, after the beginning-of-text token that the tokenizer puts in front."""
    token_ids: list[int]
    sampling: Sampling
    stops: tuple[str, ...]
    """The request's own, but for `blank_stops`, which the answer rule has to find."""
    blank_stops: tuple[str, ...]
    continued: bool
    """The client sent the beginning of the answer."""
    escaped_markers: int
    dropped_messages: int


async def compose(request: ChatRequest, engine: Engine, settings: Settings, user: User) -> Composed:
    """All that is decided of a request by what it says. Raises `InvalidRequest`."""
    preset = preset_of(request.model, settings, user)
    for number, message in enumerate(request.messages):
        if message.content is None and message.role != "assistant":
            raise InvalidRequest(
                f"`messages[{number}].content` is required: a text, or a list of text parts.",
                param=f"messages[{number}].content",
                code="missing_required_parameter",
            )
    messages, escaped = tidy(
        [Message("system" if m.role == "developer" else m.role, m.text) for m in request.messages],
        settings.markers,
        preset.system if preset else None,
    )
    continued = messages[-1].role == "assistant" if messages else False
    for name, to_continue in (
        ("continue_final_message", request.continue_final_message is True),
        ("add_generation_prompt", request.add_generation_prompt is False),
    ):
        if to_continue and not continued:
            raise InvalidRequest(
                f"`{name}` asks for the last message to be continued, which is not the "
                "assistant's: it is answered.",
                param=name,
                code="invalid_value",
            )
    if request.top_logprobs and not request.logprobs:
        raise InvalidRequest(
            "`top_logprobs` needs `logprobs: true`.", param="top_logprobs", code="invalid_value"
        )
    asked = answer_limit(_asked_tokens(request), settings.sampling.max_tokens, user)
    grammar = grammar_of(request)
    stops = request.own_stops
    blank: tuple[str, ...] = ()
    if not grammar and not request.min_tokens:
        blank = tuple(stop for stop in stops if stop.isspace())
        stops = [stop for stop in stops if not stop.isspace()]
    text, token_ids, dropped = await _fit(messages, asked, engine, settings)
    return Composed(
        text,
        token_ids,
        sampling_of(
            request,
            settings,
            engine,
            max_tokens=min(asked, engine.traits.max_model_len - len(token_ids)),
            stop=(*(() if grammar else (TURN_STOP,)), *stops),
            logprobs=(request.top_logprobs or 0) if request.logprobs else None,
            grammar=grammar,
        ),
        stops=tuple(stops),
        blank_stops=blank,
        continued=continued and bool(messages[-1].content),
        escaped_markers=escaped,
        dropped_messages=dropped,
    )


async def prepare(
    request: ChatRequest,
    engine: Engine,
    settings: Settings,
    request_id: str,
    place: Place,
    *,
    trace_headers: Mapping[str, str] | None = None,
) -> tuple[Prepared, list[Choice]]:
    """All that is decided before the engine sees the request, and the rule for its answers.

    Raises `InvalidRequest`, and whatever `Place.claim` raises.
    """
    composed = await compose(request, engine, settings, place.user)
    sampling = composed.sampling
    require_possible(sampling.n, settings, place.user)
    work = Work(
        request_id=request_id,
        prompt_token_ids=composed.token_ids,
        sampling=sampling,
        # With these the engine runs past the answer's end; seeing each step, we end it.
        deltas=bool(request.stream) or sampling.min_tokens > 0 or bool(composed.blank_stops),
        cache_salt=place.cache_salt(request.cache_salt),
        priority=await place.claim(len(composed.token_ids), sampling.max_tokens, sampling.n),
        trace_headers=trace_headers,
    )
    prepared = Prepared(
        works=(work,),
        model=request.model,
        stream=bool(request.stream),
        usage=wanted_usage(request.stream_options),
        question=next((m.text for m in reversed(request.messages) if m.role == "user"), ""),
        escaped_markers=composed.escaped_markers,
        dropped_messages=composed.dropped_messages,
        ignored=request.ignored,
        show_token_ids=bool(request.return_token_ids),
    )
    choices: list[Choice] = [
        _Answer(
            engine,
            GrammarFilter(composed.stops)
            if sampling.grammar
            else AnswerFilter(
                composed.stops, blank=composed.blank_stops, continued=composed.continued
            ),
            _Places(engine, sampling.logprobs) if sampling.logprobs is not None else None,
            special=not sampling.skip_special_tokens,
        )
        for _ in range(sampling.n)
    ]
    if prepared.show_token_ids:
        choices = [WithTokens(choice) for choice in choices]
    return prepared, choices


async def _fit(
    messages: Sequence[Message], max_tokens: int, engine: Engine, settings: Settings
) -> tuple[str, list[int], int]:
    """The prompt and its tokens, with as few of the oldest exchanges dropped as it takes to fit.

    Also returns the number of messages dropped. An answer needs one token; where exchanges may
    be dropped it gets room for `answer_reserve`, so that a long conversation is not answered in
    a word.
    """
    context = engine.traits.max_model_len
    # A longer text has more tokens than fit, whatever it says: the rest need not be counted.
    longest = (context + 1) * engine.traits.longest_token
    counted_all = True

    async def prompt_from(start: int) -> tuple[str, list[int]]:
        nonlocal counted_all
        text = render(drop_exchanges(messages, start)[0], settings.format)
        counted_all = len(text) <= longest
        return text, await engine.tokenize(
            text[:longest], special_tokens=settings.markers is Markers.ALLOW
        )

    text, token_ids = await prompt_from(0)
    may_drop = settings.overflow == "drop-oldest"
    reserve = min(max_tokens, settings.answer_reserve) if may_drop else 1
    if len(token_ids) + reserve <= context:
        return text, token_ids, 0
    starts = exchange_starts(messages) if may_drop else []
    # The fewest exchanges to drop: longer prompts do not fit, shorter ones do.
    low, high = 1, len(starts)
    fitting: tuple[str, list[int]] | None = None
    while low < high:
        middle = (low + high) // 2
        shorter = await prompt_from(starts[middle])
        if len(shorter[1]) + reserve <= context:
            fitting, high = shorter, middle
        else:
            low = middle + 1
    if fitting is not None:
        return *fitting, drop_exchanges(messages, starts[high])[1]
    if len(starts) > 1:
        text, token_ids = await prompt_from(starts[-1])
        if len(token_ids) < context:  # less room than we would like beats no answer
            return text, token_ids, drop_exchanges(messages, starts[-1])[1]
    elif len(token_ids) < context:
        return text, token_ids, 0
    raise ContextOverflow(
        f"This model's context holds {context} tokens, prompt and answer together. Your messages "
        f"are {'' if counted_all else 'at least '}{len(token_ids)} tokens"
        + (" after dropping all that may be dropped" if len(starts) > 1 else "")
        + ", which leaves no room for an answer. Shorten the messages."
    )


def _asked_tokens(request: ChatRequest) -> int | None:
    old, new = request.max_tokens, request.max_completion_tokens
    if old is not None and new is not None and old != new:
        raise InvalidRequest(
            f"`max_tokens` ({old}) and `max_completion_tokens` ({new}) mean the same; send one.",
            param="max_tokens",
            code="invalid_value",
        )
    return new or old


class _Answer:
    """One choice: the rule over what the engine says, and its log-probabilities."""

    __slots__ = ("_engine", "_places", "_rule", "_sent", "_special")

    def __init__(
        self,
        engine: Engine,
        rule: AnswerFilter | GrammarFilter,
        places: _Places | None,
        *,
        special: bool,
    ) -> None:
        self._engine = engine
        self._special = special  # the text has the names of special tokens
        self._rule = rule
        self._places = places
        self._sent = 0  # characters of the answer that went out

    def take(self, output: Output) -> Piece | None:
        rule = self._rule
        reason, stop = output.finish_reason, output.stop_reason
        if reason is None:
            text = rule.feed(output.text)
            if rule.ended is not None:  # where the engine was told to look away, or not told
                reason, stop = "stop", rule.ended
        elif reason in ("stop", "length", "repetition"):
            text = rule.finish(output.text, self._ending(reason, stop))
            reason = "length" if reason == "length" else "stop"
            stop = rule.ended or stop
        else:
            raise GrammarTooComplex if isinstance(rule, GrammarFilter) else EngineFault
        logprobs = None
        if self._places is not None:
            self._sent += len(text)
            self._places.add(output)
            logprobs = self._places.up_to(rule.skipped, self._sent)
        elif not text and reason is None:
            return None
        return Piece(output.index, text, logprobs, reason, stop)

    def _ending(self, reason: str, stop: int | str | None) -> str | None:
        """What of the text a stop takes away: itself, or the text of a token that is one."""
        if reason != "stop":
            return None
        if isinstance(stop, str):
            return stop
        data = b"" if stop is None else self._engine.token_bytes(stop)
        if data or not self._special:
            return data.decode(errors="replace") or None
        traits = self._engine.traits
        return traits.eos if stop is None else traits.special_tokens.get(stop)


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
            **self._token(token_id, data, place[token_id].logprob),
            "top_logprobs": [
                self._token(other, self._engine.token_bytes(other), value.logprob)
                for other, value in likely
            ],
        }

    def _token(self, token_id: int, data: bytes, logprob: float) -> dict[str, Any]:
        # A special token has no bytes; its name says which it is.
        name = data.decode(errors="replace") or self._engine.traits.special_tokens.get(token_id, "")
        return {"token": name, "logprob": max(logprob, LEAST_LOGPROB), "bytes": list(data)}
