"""Chat answers as bytes: the plain body, and the events of a stream."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic_core import to_json

from synthia_vllm.api.chat.protocol import (
    AnswerMessage,
    ChatChoice,
    ChatCompletion,
    ChoiceLogprobs,
)
from synthia_vllm.http.chunks import Chunks, ascii_json

if TYPE_CHECKING:
    from synthia_vllm.generate.response import Delta, ResponseState


def body(state: ResponseState, choices: list[Delta]) -> ChatCompletion:
    """The whole answer."""
    prepared = state.prepared
    return ChatCompletion(
        id=f"{ChatChunks.id_prefix}-{state.request_id}",
        created=state.created,
        model=prepared.model,
        choices=[
            ChatChoice(
                index=choice.choice,
                message=AnswerMessage(content=choice.text),
                logprobs=None
                if choice.logprobs is None
                else ChoiceLogprobs(content=choice.logprobs),
                finish_reason=choice.finish_reason,
                stop_reason=choice.stop_reason,
                token_ids=choice.token_ids,
            )
            for choice in choices
        ],
        usage=state.usage(),
        prompt_token_ids=prepared.prompt_of(0) if prepared.request.show_token_ids else None,
    )


class ChatChunks(Chunks):
    """As OpenAI's chat has them; the first of each choice brings the role, with the text."""

    __slots__ = ("_greeted",)
    id_prefix = "chatcmpl"
    kind = "chat.completion.chunk"

    def __init__(self, state: ResponseState) -> None:
        super().__init__(state)
        self._greeted: set[int] = set()

    def delta(self, delta: Delta) -> bytes:
        """The event for what was added to one answer."""
        index, text, logprobs, finish_reason, stop_reason, token_ids, _ = delta
        message = b'"content":' + ascii_json(text) if text else b""
        if index not in self._greeted:  # with the first text, not before it
            self._greeted.add(index)
            message = b'"role":"assistant",' + (message or b'"content":""')
        end = b"null"
        if finish_reason is not None:
            end = b'"%b","stop_reason":%b' % (finish_reason.encode(), ascii_json(stop_reason))
        end += b"}]" if token_ids is None else self._tokens(token_ids)
        return b'%b,"choices":[{"index":%d,"delta":{%b},"logprobs":%b,"finish_reason":%b%b' % (
            self._head,
            index,
            message,
            b"null" if logprobs is None else ascii_json({"content": logprobs}),
            end,
            self._end(),
        )

    def _tokens(self, token_ids: list[int]) -> bytes:
        """The end of a choice that shows its tokens; the first event has the prompt's, too."""
        shown = b',"token_ids":%b}]' % to_json(token_ids)
        if self._prompts:
            self._prompts.clear()
            shown += b',"prompt_token_ids":%b' % to_json(self._state.prepared.prompt_of(0))
        return shown
