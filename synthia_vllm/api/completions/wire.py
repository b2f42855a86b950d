"""Completions as bytes: the plain body, and the events of a stream."""

from __future__ import annotations

from typing import TYPE_CHECKING

from synthia_vllm.api.completions.protocol import Completion, CompletionChoice
from synthia_vllm.api.completions.text import logprobs_of
from synthia_vllm.http.chunks import Chunks, ascii_json

if TYPE_CHECKING:
    from synthia_vllm.generate.response import Delta, ResponseState


def body(state: ResponseState, choices: list[Delta]) -> Completion:
    """The whole answer."""
    prepared = state.prepared
    return Completion(
        id=f"{TextChunks.id_prefix}-{state.request_id}",
        created=state.created,
        model=prepared.model,
        system_fingerprint=state.fingerprint,
        choices=[
            CompletionChoice(
                index=choice.choice,
                text=choice.text,
                logprobs=logprobs_of(choice.logprobs),
                finish_reason=choice.finish_reason,
                stop_reason=choice.stop_reason,
                token_ids=choice.token_ids,
                prompt_token_ids=prepared.prompt_of(choice.choice)
                if prepared.request.show_token_ids
                else None,
                prompt_logprobs=choice.prompt_logprobs,
            )
            for choice in choices
        ],
        usage=state.usage(),
    )


class TextChunks(Chunks):
    """As OpenAI's completions have them."""

    __slots__ = ()
    id_prefix = "cmpl"
    kind = "text_completion"

    def delta(self, delta: Delta) -> bytes:
        """The event for what was added to one answer."""
        choice = {
            "index": delta.choice,
            "text": delta.text,
            "logprobs": logprobs_of(delta.logprobs),
            "finish_reason": delta.finish_reason,
            "stop_reason": delta.stop_reason,
        }
        if delta.token_ids is not None:
            choice["token_ids"] = delta.token_ids
            if delta.choice in self._prompts:
                self._prompts.discard(delta.choice)
                choice["prompt_token_ids"] = self._state.prepared.prompt_of(delta.choice)
        return b'%b,"choices":[%b]%b' % (self._head, ascii_json(choice), self._end())
