"""How a request is sampled, in vLLM's words."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from synthia_vllm.engine.base import EngineRequest, Sampling


def sampling_params(request: EngineRequest) -> Any:
    """`SamplingParams` for `request`, which may be those of another that asks for the same.

    vLLM works on a copy of its own; the sets in it are shared, and only ever get the model's
    end-of-text tokens.
    """
    asked = request.sampling
    prompt = request.on_prompt is not None
    if asked.grammar is not None or asked.logit_bias is not None:
        return _made(asked, deltas=request.deltas, prompt=prompt)
    return _kept(asked, deltas=request.deltas, prompt=prompt)


def _made(asked: Sampling, *, deltas: bool, prompt: bool) -> Any:
    from vllm import SamplingParams
    from vllm.sampling_params import (
        RepetitionDetectionParams,
        RequestOutputKind,
        StructuredOutputsParams,
    )

    structured = None
    if asked.grammar is not None:
        structured = StructuredOutputsParams(**{asked.grammar.kind: asked.grammar.text})
        # vLLM internal: `vllm.sampling_params.StructuredOutputsParams._backend`; its check would
        # set it.
        structured._backend = "guidance"
    repetition = None
    if asked.repetition is not None:
        repetition = RepetitionDetectionParams(*asked.repetition)
    return SamplingParams(
        n=asked.n,
        temperature=asked.temperature,
        top_p=asked.top_p,
        top_k=asked.top_k,
        min_p=asked.min_p,
        presence_penalty=asked.presence_penalty,
        frequency_penalty=asked.frequency_penalty,
        repetition_penalty=asked.repetition_penalty,
        seed=asked.seed,
        stop=list(asked.stop),
        # For chat the answer rule decides what of a stop string is sent; with it in the text vLLM
        # holds nothing back: a token is delivered when it is made, not four characters later.
        include_stop_str_in_output=asked.stop_in_text,
        max_tokens=asked.max_tokens,
        min_tokens=asked.min_tokens,
        ignore_eos=asked.ignore_eos,
        stop_token_ids=list(asked.stop_token_ids),
        bad_words=list(asked.bad_words),
        allowed_token_ids=None
        if asked.allowed_token_ids is None
        else list(asked.allowed_token_ids),
        skip_special_tokens=asked.skip_special_tokens,
        spaces_between_special_tokens=asked.spaces_between_special_tokens,
        repetition_detection=repetition,
        stream_interval=asked.stream_interval,
        logprobs=asked.logprobs,
        prompt_logprobs=asked.prompt_logprobs if prompt else None,
        logit_bias=dict(asked.logit_bias) if asked.logit_bias else None,
        structured_outputs=structured,
        output_kind=RequestOutputKind.DELTA if deltas else RequestOutputKind.FINAL_ONLY,
        skip_clone=True,  # a copy of the whole would be deep
    )


_kept = lru_cache(256)(_made)
