"""How tokens are chosen: what a request says, else the server's defaults; and grammars."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from synthia_vllm.engine.base import Grammar, Sampling
from synthia_vllm.errors import InvalidRequest, UnknownModel

if TYPE_CHECKING:
    from collections.abc import Mapping

    from synthia_vllm.admission.users import User
    from synthia_vllm.engine.base import Engine
    from synthia_vllm.generate.protocol import GenerationRequest, SamplingRequest
    from synthia_vllm.settings import Settings
    from synthia_vllm.template.prompt import Preset


def preset_of(model: str, settings: Settings, user: User) -> Preset | None:
    """The preset that the served name `model` stands for.

    Raises `UnknownModel`, and `Forbidden` if it is not for this user.
    """
    served = settings.served
    if model not in served:
        raise UnknownModel(model, tuple(served))
    user.require_model(model)
    return served[model]


def sampling_of(
    request: SamplingRequest,
    settings: Settings,
    engine: Engine,
    *,
    max_tokens: int,
    stop: tuple[str, ...],
    stop_in_text: bool = True,
    logprobs: int | None = None,
    prompt_logprobs: int | None = None,
    grammar: Grammar | None = None,
) -> Sampling:
    """The engine's parameters: what the request says, else the server's defaults.

    Raises `InvalidRequest`.
    """
    defaults = settings.sampling

    def or_default(value: Any, default: Any) -> Any:
        return default if value is None else value

    n = request.answers
    temperature = or_default(request.temperature, defaults.temperature)
    if n > settings.limits.max_n:
        raise InvalidRequest(
            f"`n` is {n}; this server gives at most {settings.limits.max_n} answers at once.",
            param="n",
            code="invalid_value",
        )
    top_k = or_default(request.top_k, defaults.top_k)
    if n > 1 and temperature == 0:  # vLLM makes only one greedy answer; these are the same
        temperature, top_k = 1.0, 1
    min_tokens = request.min_tokens or 0
    if min_tokens > max_tokens:
        raise InvalidRequest(
            f"`min_tokens` is {min_tokens}, but the answer can have at most {max_tokens} tokens.",
            param="min_tokens",
            code="invalid_value",
        )
    if min_tokens and grammar is not None:
        raise InvalidRequest(
            f"`min_tokens` goes with no `{grammar.param}`: the grammar ends the answer.",
            param="min_tokens",
            code="invalid_value",
        )
    return Sampling(
        max_tokens=max_tokens,
        n=n,
        temperature=temperature,
        top_p=or_default(request.top_p, defaults.top_p),
        top_k=top_k,
        min_p=or_default(request.min_p, defaults.min_p),
        presence_penalty=or_default(request.presence_penalty, 0.0),
        frequency_penalty=or_default(request.frequency_penalty, 0.0),
        repetition_penalty=or_default(_repetition_penalty(request), defaults.repetition_penalty),
        seed=_seed(request.seed, n),
        stop=stop,
        stop_in_text=stop_in_text,
        stop_token_ids=_tokens(request.stop_token_ids, "stop_token_ids", engine) or (),
        bad_words=tuple(request.bad_words or ()),
        allowed_token_ids=_tokens(request.allowed_token_ids, "allowed_token_ids", engine),
        min_tokens=min_tokens,
        ignore_eos=bool(request.ignore_eos) and grammar is None,
        skip_special_tokens=request.skip_special_tokens is not False,
        spaces_between_special_tokens=request.spaces_between_special_tokens is not False,
        repetition=_repetition(request),
        stream_interval=request.stream_interval,
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
        logit_bias=_logit_bias(request.logit_bias, engine.model_info.vocab_size),
        grammar=grammar,
    )


def grammar_of(request: GenerationRequest) -> Grammar | None:
    """The grammar that shall rule the answer, if any. Raises `InvalidRequest`.

    Whether it can be enforced is for the engine to say.
    """
    wanted, own = request.response_format, request.structured_outputs
    found: list[Grammar] = []
    if wanted is not None and wanted.type == "json_object":
        found.append(json_grammar(None, "response_format"))
    elif wanted is not None and wanted.type == "json_schema":
        if wanted.json_schema is None:
            raise InvalidRequest(
                "`response_format.json_schema` is required with type 'json_schema'.",
                param="response_format.json_schema",
                code="missing_required_parameter",
            )
        schema = wanted.json_schema.schema_
        found.append(json_grammar(schema, "response_format.json_schema.schema"))
    if own is not None:
        if own.json_object:
            found.append(json_grammar(None, "structured_outputs.json_object"))
        if own.json_ is not None:
            found.append(json_grammar(own.json_, "structured_outputs.json"))
        if own.regex is not None:
            found.append(Grammar("regex", own.regex, "structured_outputs.regex"))
        if own.choice is not None:
            # One regular expression: of alternatives in EBNF there may be 2,000.
            texts = " | ".join(json.dumps(text) for text in own.choice)
            text = f"start: CHOICE\nCHOICE: {texts}"
            found.append(Grammar("grammar", text, "structured_outputs.choice"))
        if own.grammar is not None:
            found.append(Grammar("grammar", own.grammar, "structured_outputs.grammar"))
        if not found:
            raise InvalidRequest(
                "`structured_outputs` needs one of `json`, `json_object`, `regex`, `choice`, "
                "`grammar`.",
                param="structured_outputs",
                code="missing_required_parameter",
            )
    if len(found) > 1:
        raise InvalidRequest(
            f"`{found[0].param}` and `{found[1].param}` cannot both rule the answer; send one.",
            param=found[1].param,
            code="invalid_value",
        )
    return found[0] if found else None


def json_grammar(schema: Mapping[str, Any] | str | None, param: str) -> Grammar:
    """JSON of `schema`, which the field `param` has; any object, without one.

    Raises `InvalidRequest`.
    """
    if schema is None:
        schema = {"type": "object"}
    try:
        text = schema if isinstance(schema, str) else json.dumps(schema, allow_nan=False)
    except ValueError:
        raise InvalidRequest(
            f"`{param}` has a number that is too large for JSON.", param=param, code="invalid_value"
        ) from None
    return Grammar("json", text, param)


def _repetition_penalty(request: SamplingRequest) -> float | None:
    ours, theirs = request.repetition_penalty, request.repeat_penalty
    if ours is not None and theirs is not None and ours != theirs:
        raise InvalidRequest(
            f"`repetition_penalty` ({ours}) and `repeat_penalty` ({theirs}) mean the same; send "
            "one.",
            param="repeat_penalty",
            code="invalid_value",
        )
    return theirs if ours is None else ours


def _repetition(request: SamplingRequest) -> tuple[int, int, int] | None:
    wanted = request.repetition_detection
    if wanted is None:
        return None
    shortest = wanted.min_pattern_size or 1
    if shortest > wanted.max_pattern_size:
        raise InvalidRequest(
            f"`min_pattern_size` is {shortest}, but `max_pattern_size` {wanted.max_pattern_size}.",
            param="repetition_detection.min_pattern_size",
            code="invalid_value",
        )
    return wanted.max_pattern_size, shortest, wanted.min_count


def _seed(asked: int | None, n: int) -> int | None:
    """Each of `n` answers gets this seed plus its number, of which -1 means none to vLLM."""
    return asked + 2**62 if asked is not None and asked <= -1 < asked + n else asked


def _tokens(asked: list[int] | None, name: str, engine: Engine) -> tuple[int, ...] | None:
    size = engine.model_info.vocab_size
    if asked and max(asked) >= size:
        raise InvalidRequest(
            f"`{name}` has token {max(asked)}; the model has {size} tokens, from 0.",
            param=name,
            code="invalid_value",
        )
    return None if asked is None else tuple(asked)


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
