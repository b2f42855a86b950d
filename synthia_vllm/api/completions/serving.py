"""One request for raw completions: no roles, no template, no stops but the request's own.

prepare:  prompts -> tokens -> budget -> works for the engine
_Text:    what the engine says -> one text, as it is
"""

from __future__ import annotations

import codecs
from typing import TYPE_CHECKING, Any, Final

from synthia_vllm.api.chat.serving import LEAST_LOGPROB
from synthia_vllm.api.completions.protocol import (
    DEFAULT_MAX_TOKENS,
    CompletionLogprobs,
    PromptLogprob,
)
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

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from synthia_vllm.admission.tenants import Place
    from synthia_vllm.api.completions.protocol import CompletionRequest
    from synthia_vllm.engine.base import Engine, Output, PromptLogprobs, TokenLogprob
    from synthia_vllm.generate.response import Choice
    from synthia_vllm.settings import Settings

# Log-probabilities in one answer's prompts: some 25 MB here, and 10 MB of JSON.
_MAX_PROMPT_LOGPROBS: Final = 1 << 18

Entry = tuple[str, float | None, "dict[str, float] | None", int]
"""A token's text, its log-probability, those of the likeliest there, and where it begins."""


async def prepare(
    request: CompletionRequest,
    engine: Engine,
    settings: Settings,
    request_id: str,
    place: Place,
    *,
    trace_headers: Mapping[str, str] | None = None,
) -> tuple[Prepared, list[Choice]]:
    """All that is decided before the engine sees the request, and the rule for its answers.

    `max_tokens` of 0 runs one token, which is counted and not shown: the engine knows no less.
    Raises `InvalidRequest`, and whatever `Place.claim` raises.
    """
    preset_of(request.model, settings, place.user)
    asked = answer_limit(
        request.max_tokens, min(DEFAULT_MAX_TOKENS, settings.sampling.max_tokens), place.user
    )
    prompts = [await _tokens_of(prompt, engine) for prompt in request.prompts]
    if request.truncate_prompt_tokens is not None:
        keep = request.truncate_prompt_tokens
        room = engine.traits.max_model_len - max(asked, 1)
        prompts = [_last(prompt, room if keep == -1 else keep) for prompt in prompts]
    longest = max(map(len, prompts))
    _require_room(longest, engine)
    silent = asked == 0
    sampling = sampling_of(
        request,
        settings,
        engine,
        max_tokens=min(max(asked, 1), engine.traits.max_model_len - longest),
        stop=tuple(request.own_stops),
        stop_in_text=bool(request.include_stop_str_in_output),
        logprobs=request.logprobs,
        prompt_logprobs=_wanted_of_prompt(request),
        grammar=grammar_of(request),
    )
    require_possible(len(prompts) * sampling.n, settings, place.user)
    if sampling.prompt_logprobs is not None:
        _check_scored(prompts, sampling.prompt_logprobs, settings.limits.max_scored_tokens)
    total = sum(map(len, prompts))
    priority = await place.claim(total, sampling.max_tokens, len(prompts) * sampling.n)
    works: list[Work] = []
    choices: list[Choice] = []
    for prompt, token_ids in zip(request.prompts, prompts, strict=True):
        echo = ""
        if request.echo:
            echo = prompt if isinstance(prompt, str) else _Decoder(engine).text_of(token_ids)
        texts = [
            _Text(
                echo,
                engine if request.prompt_logprobs is not None else None,
                _Places(engine, token_ids, sampling.logprobs, echo=bool(request.echo))
                if sampling.logprobs is not None
                else None,
                silent=silent,
                ruled=sampling.grammar is not None,
            )
            for _ in range(sampling.n)
        ]
        works.append(
            Work(
                request_id=request_id,
                prompt_token_ids=token_ids,
                sampling=sampling,
                deltas=bool(request.stream),
                cache_salt=place.cache_salt(request.cache_salt),
                priority=priority,
                trace_headers=trace_headers,
                on_prompt=None if sampling.prompt_logprobs is None else _told(texts),
            )
        )
        choices += map(WithTokens, texts) if request.return_token_ids else texts
    question = ""
    if settings.log_content:
        shown = (p if isinstance(p, str) else _Decoder(engine).text_of(p) for p in request.prompts)
        question = "\n".join(shown)
    return Prepared(
        works=tuple(works),
        model=request.model,
        stream=bool(request.stream),
        usage=wanted_usage(request.stream_options),
        question=question,
        conversation=False,
        ignored=request.ignored,
        show_token_ids=bool(request.return_token_ids),
    ), choices


async def _tokens_of(prompt: str | list[int], engine: Engine) -> list[int]:
    """The tokens of one prompt; given as such, they are left as they are."""
    traits = engine.traits
    if isinstance(prompt, str):
        # A longer text has more tokens than fit, whatever it says.
        return await engine.tokenize(
            prompt[: (traits.max_model_len + 1) * traits.longest_token], special_tokens=True
        )
    largest = max(prompt)
    if largest >= traits.vocab_size:
        raise InvalidRequest(
            f"`prompt` has token {largest}; the model has {traits.vocab_size} tokens, from 0.",
            param="prompt",
            code="invalid_value",
        )
    return prompt


def _last(token_ids: list[int], keep: int) -> list[int]:
    """The last tokens of a prompt, at least one of them."""
    return token_ids[-max(1, keep) :]


def _wanted_of_prompt(request: CompletionRequest) -> int | None:
    """How many log-probabilities at each place of the prompt; `None` for none at all."""
    echoed = request.logprobs if request.echo else None
    own = request.prompt_logprobs
    if own is not None and request.stream:
        raise InvalidRequest(
            "`prompt_logprobs` are not streamed; `echo` with `logprobs` are.",
            param="prompt_logprobs",
            code="invalid_value",
        )
    return max((count for count in (own, echoed) if count is not None), default=None)


def _require_room(longest: int, engine: Engine) -> None:
    context = engine.traits.max_model_len
    if longest >= context:
        raise ContextOverflow(
            f"This model's context holds {context} tokens, prompt and answer together. Your "
            f"longest prompt is {longest} tokens or more, which leaves no room for an answer.",
            param="prompt",
        )


def _check_scored(prompts: Sequence[Sequence[int]], top: int, limit: int) -> None:
    """Raise `InvalidRequest` if the prompts' log-probabilities would take too much memory."""
    longest = max(map(len, prompts))
    if longest > limit:
        raise InvalidRequest(
            f"`echo` with `logprobs` is for prompts of at most {limit} tokens here (the setting "
            f"limits.max_scored_tokens); the longest of yours has {longest}.",
            param="prompt",
            code="invalid_value",
        )
    wanted = (top + 1) * sum(map(len, prompts))
    if wanted > _MAX_PROMPT_LOGPROBS:
        raise InvalidRequest(
            f"`echo` with `logprobs: {top}` asks for {wanted} log-probabilities; at most "
            f"{_MAX_PROMPT_LOGPROBS} are given at once. Send fewer prompts, or a smaller number.",
            param="logprobs",
            code="invalid_value",
        )


def _told(texts: Iterable[_Text]) -> Any:
    def tell(places: PromptLogprobs) -> None:
        for text in texts:
            text.take_prompt(places)

    return tell


class _Text:
    """One choice: what the engine says as it is, after the prompt if that is to be echoed."""

    __slots__ = ("_echo", "_places", "_ruled", "_scored", "_shower", "_silent")

    def __init__(
        self,
        echo: str,
        shower: Engine | None,
        places: _Places | None,
        *,
        silent: bool,
        ruled: bool,
    ) -> None:
        self._echo = echo
        self._shower = shower  # of the prompt's log-probabilities in vLLM's form
        self._places = places
        self._silent = silent
        self._ruled = ruled
        self._scored: PromptLogprobs = ()

    def take_prompt(self, places: PromptLogprobs) -> None:
        """Note the prompt's log-probabilities, which go out with the first piece."""
        self._scored = places

    def take(self, output: Output) -> Piece | None:
        reason = output.finish_reason
        if reason == "repetition":
            reason = "stop"
        elif reason not in (None, "stop", "length"):
            raise GrammarTooComplex if self._ruled else EngineFault
        text, self._echo = self._echo, ""
        logprobs: list[Entry] | None = None
        of_prompt = None
        if self._shower is not None and self._scored:
            of_prompt = _in_vllms_form(self._scored, self._shower)
        if self._places is not None:
            logprobs = self._places.of_prompt(self._scored) if self._scored else []
        self._scored = ()
        if self._silent:
            return Piece(output.index, text, logprobs, "length", None, None, of_prompt)
        text += output.text
        if logprobs is not None and self._places is not None:
            logprobs += self._places.of_answer(output)
        if not text and not logprobs and reason is None:
            return None
        return Piece(output.index, text, logprobs, reason, output.stop_reason, None, of_prompt)


def _in_vllms_form(places: PromptLogprobs, engine: Engine) -> list[dict[int, PromptLogprob] | None]:
    return [
        None
        if place is None
        else {
            token: PromptLogprob(
                logprob=max(it.logprob, LEAST_LOGPROB),
                rank=it.rank,
                decoded_token=_name(engine, token),
            )
            for token, it in place.items()
        }
        for place in places
    ]


def _name(engine: Engine, token_id: int) -> str:
    """The text of a token; where that is no text by itself, OpenAI's spelling of its bytes."""
    data = engine.token_bytes(token_id)
    try:
        return data.decode() or engine.traits.special_tokens.get(token_id, "")
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


class _Decoder:
    """Tokens as text, each with the place where it begins; special ones have no text."""

    __slots__ = ("_engine", "_utf8", "end")

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self.end = 0
        """Characters so far."""

    def feed(self, token_id: int) -> tuple[str, int]:
        """The text that `token_id` completes, and where the token begins."""
        text = self._utf8.decode(self._engine.token_bytes(token_id))
        begin = self.end
        self.end += len(text)
        return text, begin

    def text_of(self, token_ids: Iterable[int]) -> str:
        """The whole text, without the space that the tokenizer puts in front of all text."""
        return "".join([self.feed(token)[0] for token in token_ids]).removeprefix(" ")


class _Places:
    """The log-probabilities of one choice in the form of OpenAI's completions."""

    __slots__ = ("_decoder", "_engine", "_lead", "_prompt", "_top")

    def __init__(self, engine: Engine, prompt: Sequence[int], top: int, *, echo: bool) -> None:
        self._engine = engine
        self._prompt = prompt
        self._top = top
        self._decoder = _Decoder(engine)
        self._lead = 0
        """Characters in front of the tokens' text that are not in the echoed one."""
        if echo:
            first = next((data for data in map(engine.token_bytes, prompt) if data), b"")
            self._lead = int(first.startswith(b" "))

    def of_prompt(self, places: PromptLogprobs) -> list[Entry]:
        """An entry for each token of the prompt."""
        return [
            self._entry(token, place) for token, place in zip(self._prompt, places, strict=True)
        ]

    def of_answer(self, output: Output) -> list[Entry]:
        """An entry for each token of `output`, also for one that has no text."""
        places = output.logprobs or ()
        return [
            self._entry(token, place)
            for token, place in zip(output.token_ids, places, strict=False)
        ]

    def _entry(self, token_id: int, place: Mapping[int, TokenLogprob] | None) -> Entry:
        begin = max(0, self._decoder.feed(token_id)[1] - self._lead)
        name = _name(self._engine, token_id)
        if place is None:
            return name, None, None, begin
        likely = sorted(place.items(), key=lambda item: -item[1].logprob)[: self._top]
        top = {
            _name(self._engine, other): max(it.logprob, LEAST_LOGPROB)
            for other, it in reversed(likely)
        }
        own = max(place[token_id].logprob, LEAST_LOGPROB)
        return name, own, {**top, name: top.get(name, own)}, begin


def logprobs_of(entries: Sequence[Entry] | None) -> CompletionLogprobs | None:
    """`entries` as four lists."""
    if entries is None:
        return None
    return CompletionLogprobs(
        tokens=[entry[0] for entry in entries],
        token_logprobs=[entry[1] for entry in entries],
        top_logprobs=[entry[2] for entry in entries],
        text_offset=[entry[3] for entry in entries],
    )
