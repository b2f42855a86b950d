"""The next answer of a conversation, for every route that has one.

compose: messages -> prompt -> tokens -> budget
prepare: all of that, with the tokens claimed -> a request for the engine, rules for its answers
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from synthia_vllm.engine.base import EngineRequest
from synthia_vllm.generate.answer import Answer
from synthia_vllm.generate.fit import fit
from synthia_vllm.generate.logprobs import AnswerLogprobs
from synthia_vllm.generate.response import Prepared, WithTokens
from synthia_vllm.generate.sampling import preset_of, sampling_of
from synthia_vllm.template.answer import AnswerFilter, GrammarFilter
from synthia_vllm.template.prompt import normalize_messages

if TYPE_CHECKING:
    from collections.abc import Sequence

    from synthia_vllm.admission.users import User
    from synthia_vllm.engine.base import Engine, Grammar, Sampling
    from synthia_vllm.generate.call import Call
    from synthia_vllm.generate.protocol import SamplingRequest, UsageEvents
    from synthia_vllm.generate.response import Choice
    from synthia_vllm.settings import Settings
    from synthia_vllm.template.prompt import Message


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
    question: str
    """What the user said last, as it was sent."""
    cache_salt: str | None
    """As in the `EngineRequest`."""
    usage: UsageEvents
    escaped_markers: int
    dropped_messages: int


async def compose(
    request: SamplingRequest,
    messages: Sequence[Message],
    engine: Engine,
    settings: Settings,
    user: User,
    *,
    cache_salt: str | None,
    max_tokens: int | None,
    grammar: Grammar | None = None,
    logprobs: int | None = None,
    may_drop: bool = False,
) -> Composed:
    """What the model will be asked, for the conversation of `messages`.

    The answer may have `max_tokens`, if the request asks for a number; `grammar` rules it;
    `logprobs` is how many of the likeliest tokens to report. With `may_drop` the oldest exchanges
    may be forgotten, whatever the setting says. Raises `InvalidRequest`.
    """
    preset = preset_of(request.model, settings, user)
    fmt = settings.prompt_format
    turns, escaped = normalize_messages(
        messages, settings.markers, preset.system if preset else None, fmt=fmt
    )
    asked = user.max_answer_tokens(max_tokens, settings.sampling.max_tokens)
    stops, usage = request.own_stops, request.usage_events
    blank: tuple[str, ...] = ()
    if not grammar and not request.min_tokens:
        blank = tuple(stop for stop in stops if stop.isspace())
        stops = [stop for stop in stops if not stop.isspace()]
    text, token_ids, dropped = await fit(
        turns, asked, engine, settings, cache_salt=cache_salt, may_drop=may_drop
    )
    return Composed(
        text,
        token_ids,
        sampling_of(
            request,
            settings,
            engine,
            max_tokens=min(asked, engine.model_info.max_model_len - len(token_ids)),
            stop=(*(() if grammar else fmt.stops), *stops),
            logprobs=logprobs,
            grammar=grammar,
        ),
        stops=tuple(stops),
        blank_stops=blank,
        continued=bool(turns) and turns[-1].role == "assistant" and bool(turns[-1].content),
        question=next((m.content for m in reversed(messages) if m.role == "user"), ""),
        cache_salt=cache_salt,
        usage=usage,
        escaped_markers=escaped,
        dropped_messages=dropped,
    )


async def prepare(call: Call, request: SamplingRequest, composed: Composed) -> Prepared:
    """`composed` as a request for the engine. Raises whatever `AdmissionPermit.claim` raises."""
    sampling, engine, permit = composed.sampling, call.engine, call.permit
    engine_request = EngineRequest(
        request_id=call.id,
        prompt_token_ids=composed.token_ids,
        sampling=sampling,
        # With these the engine runs past the answer's end; seeing each step, we end it.
        deltas=bool(request.stream) or sampling.min_tokens > 0 or bool(composed.blank_stops),
        cache_salt=composed.cache_salt,
        priority=await permit.claim(len(composed.token_ids), sampling.max_tokens, sampling.n),
        trace_headers=call.trace_headers,
    )
    turn_stops = call.settings.prompt_format.stops
    choices: list[Choice] = [
        Answer(
            engine,
            GrammarFilter(composed.stops)
            if sampling.grammar
            else AnswerFilter(
                turn_stops,
                composed.stops,
                blank=composed.blank_stops,
                continued=composed.continued,
            ),
            AnswerLogprobs(engine, sampling.logprobs) if sampling.logprobs is not None else None,
            special=not sampling.skip_special_tokens,
        )
        for _ in range(sampling.n)
    ]
    if request.show_token_ids:
        choices = [WithTokens(choice) for choice in choices]
    return Prepared(
        request=request,
        engine_requests=(engine_request,),
        choices=tuple(choices),
        usage=composed.usage,
        question=composed.question,
        escaped_markers=composed.escaped_markers,
        dropped_messages=composed.dropped_messages,
    )
