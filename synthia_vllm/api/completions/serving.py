"""What a request for raw completions asks for: no roles, no template, no stops but its own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from synthia_vllm.api.completions.protocol import DEFAULT_MAX_TOKENS, CompletionRequest
from synthia_vllm.api.completions.text import CompletionText, TextLogprobs, TokenDecoder
from synthia_vllm.engine.base import EngineRequest
from synthia_vllm.errors import ContextOverflow, InvalidRequest
from synthia_vllm.generate.response import Prepared, WithTokens
from synthia_vllm.generate.sampling import grammar_of, preset_of, sampling_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from synthia_vllm.admission.users import User
    from synthia_vllm.engine.base import Engine, PromptLogprobs
    from synthia_vllm.generate.call import Call
    from synthia_vllm.generate.response import Choice
    from synthia_vllm.settings import Settings

# Log-probabilities in one answer's prompts: some 25 MB here, and 10 MB of JSON.
_MAX_PROMPT_LOGPROBS: Final = 1 << 18


async def prepare(call: Call) -> Prepared:
    """All that is decided before the engine sees the request, and the rules for its answers.

    `max_tokens` of 0 runs one token, which is counted and not shown: the engine knows no less.
    Raises `InvalidRequest`, and whatever `AdmissionPermit.claim` raises.
    """
    request = call.parse(CompletionRequest)
    engine, settings, user = call.engine, call.settings, call.permit.user
    usage = request.usage_events
    asked, prompts = await tokenized(request, engine, settings, user)
    longest = max(map(len, prompts))
    sampling = sampling_of(
        request,
        settings,
        engine,
        max_tokens=min(max(asked, 1), engine.model_info.max_model_len - longest),
        stop=tuple(request.own_stops),
        stop_in_text=bool(request.include_stop_str_in_output),
        logprobs=request.logprobs,
        prompt_logprobs=_wanted_of_prompt(request),
        grammar=grammar_of(request),
    )
    if sampling.prompt_logprobs is not None:
        _check_scored(prompts, sampling.prompt_logprobs, settings.limits.max_scored_tokens)
    priority = await call.permit.claim(
        sum(map(len, prompts)), sampling.max_tokens, len(prompts) * sampling.n
    )
    engine_requests: list[EngineRequest] = []
    choices: list[Choice] = []
    for prompt, token_ids in zip(request.prompts, prompts, strict=True):
        echo = ""
        if request.echo:
            echo = prompt if isinstance(prompt, str) else TokenDecoder(engine).text_of(token_ids)
        texts = [
            CompletionText(
                echo,
                engine if request.prompt_logprobs is not None else None,
                TextLogprobs(engine, token_ids, sampling.logprobs, echo=bool(request.echo))
                if sampling.logprobs is not None
                else None,
                silent=asked == 0,
                ruled=sampling.grammar is not None,
            )
            for _ in range(sampling.n)
        ]
        engine_requests.append(
            EngineRequest(
                request_id=call.id,
                prompt_token_ids=token_ids,
                sampling=sampling,
                deltas=bool(request.stream),
                cache_salt=call.permit.cache_salt(request.cache_salt),
                priority=priority,
                trace_headers=call.trace_headers,
                on_prompt=None if sampling.prompt_logprobs is None else _told(texts),
            )
        )
        choices += map(WithTokens, texts) if request.show_token_ids else texts
    question = ""
    if settings.log_content:
        shown = (
            p if isinstance(p, str) else TokenDecoder(engine).text_of(p) for p in request.prompts
        )
        question = "\n".join(shown)
    return Prepared(
        request=request,
        engine_requests=tuple(engine_requests),
        choices=tuple(choices),
        usage=usage,
        question=question,
        conversation=False,
    )


async def tokenized(
    request: CompletionRequest, engine: Engine, settings: Settings, user: User
) -> tuple[int, list[list[int]]]:
    """How long an answer may be, and the tokens of each prompt, which leave room for one.

    Raises `InvalidRequest`.
    """
    preset_of(request.model, settings, user)
    asked = user.max_answer_tokens(
        request.max_tokens, min(DEFAULT_MAX_TOKENS, settings.sampling.max_tokens)
    )
    prompts = [await _tokens_of(prompt, engine) for prompt in request.prompts]
    if request.truncate_prompt_tokens is not None:
        keep = request.truncate_prompt_tokens
        left = engine.model_info.max_model_len - max(asked, 1)
        prompts = [_last(prompt, left if keep == -1 else keep) for prompt in prompts]
    _require_context(max(map(len, prompts)), engine)
    return asked, prompts


async def _tokens_of(prompt: str | list[int], engine: Engine) -> list[int]:
    """The tokens of one prompt; given as such, they are left as they are."""
    model_info = engine.model_info
    if isinstance(prompt, str):
        # A longer text has more tokens than fit, whatever it says.
        return await engine.tokenize(
            prompt[: (model_info.max_model_len + 1) * model_info.longest_token], special_tokens=True
        )
    largest = max(prompt)
    if largest >= model_info.vocab_size:
        raise InvalidRequest(
            f"`prompt` has token {largest}; the model has {model_info.vocab_size} tokens, from 0.",
            param="prompt",
            code="invalid_value",
        )
    return prompt


def _last(token_ids: list[int], keep: int) -> list[int]:
    """The last tokens of a prompt, at least one of them."""
    return token_ids[-max(1, keep) :]


def _wanted_of_prompt(request: CompletionRequest) -> int | None:
    """How many log-probabilities at each position of the prompt; `None` for none at all."""
    echoed = request.logprobs if request.echo else None
    own = request.prompt_logprobs
    if own is not None and request.stream:
        raise InvalidRequest(
            "`prompt_logprobs` are not streamed; `echo` with `logprobs` are.",
            param="prompt_logprobs",
            code="invalid_value",
        )
    return max((count for count in (own, echoed) if count is not None), default=None)


def _require_context(longest: int, engine: Engine) -> None:
    context = engine.model_info.max_model_len
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


def _told(texts: Iterable[CompletionText]) -> Any:
    def tell(positions: PromptLogprobs) -> None:
        for text in texts:
            text.take_prompt(positions)

    return tell
