"""Chat answers as bytes: the plain body, and the events of a stream."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from pydantic_core import to_json

from synthia_vllm.api.chat.protocol import (
    AnswerMessage,
    ChatChoice,
    ChatCompletion,
    ChoiceLogprobs,
)
from synthia_vllm.api.chat.tools import forced_tool
from synthia_vllm.http.chunks import Chunks, ascii_json

if TYPE_CHECKING:
    from synthia_vllm.api.chat.protocol import ChatRequest
    from synthia_vllm.api.chat.tools import ForcedTool
    from synthia_vllm.generate.response import Delta, ResponseState


def body(state: ResponseState, choices: list[Delta]) -> ChatCompletion:
    """The whole answer."""
    prepared, tool = state.prepared, _tool(state)
    return ChatCompletion(
        id=f"{ChatChunks.id_prefix}-{state.request_id}",
        created=state.created,
        model=prepared.model,
        system_fingerprint=state.fingerprint,
        choices=[
            ChatChoice(
                index=choice.choice,
                message=_message(state, choice, tool),
                logprobs=None
                if choice.logprobs is None
                else ChoiceLogprobs(content=choice.logprobs),
                finish_reason=_finish_reason(choice.finish_reason, tool),
                stop_reason=choice.stop_reason,
                token_ids=choice.token_ids,
            )
            for choice in choices
        ],
        usage=state.usage(),
        prompt_token_ids=prepared.prompt_of(0) if prepared.request.show_token_ids else None,
    )


def _tool(state: ResponseState) -> ForcedTool | None:
    return forced_tool(cast("ChatRequest", state.prepared.request))


def _message(state: ResponseState, choice: Delta, tool: ForcedTool | None) -> AnswerMessage:
    if tool is None:
        return AnswerMessage(content=choice.text)
    call = tool.call(state.request_id, choice.choice, choice.text)
    return AnswerMessage(content=None, tool_calls=[call])


def _finish_reason(reason: str | None, tool: ForcedTool | None) -> str | None:
    return tool.finish_reason if tool is not None and reason == "stop" else reason


class ChatChunks(Chunks):
    """As OpenAI's chat has them; the first of each choice brings the role, with the text.

    Of a forced tool the text is what is added to the arguments of its call, which that one begins.
    """

    __slots__ = ("_after", "_before", "_greeted", "_tool")
    id_prefix = "chatcmpl"
    kind = "chat.completion.chunk"

    def __init__(self, state: ResponseState) -> None:
        super().__init__(state)
        self._greeted: set[int] = set()
        self._tool = _tool(state)
        # What stands around a text.
        self._before, self._after = b'"content":', b""
        if self._tool is not None:
            self._before = b'"tool_calls":[{"index":0,"function":{"arguments":'
            self._after = b"}}]"

    def delta(self, delta: Delta) -> bytes:
        """The event for what was added to one answer."""
        index, text, logprobs, finish_reason, stop_reason, token_ids, _ = delta
        message = b""
        if index not in self._greeted:  # with the first text, not before it
            self._greeted.add(index)
            message = self._greeting(index) + ascii_json(text) + self._after
        elif text:
            message = self._before + ascii_json(text) + self._after
        end = b"null"
        if finish_reason is not None:
            end = b'%b,"stop_reason":%b' % (
                ascii_json(_finish_reason(finish_reason, self._tool)),
                ascii_json(stop_reason),
            )
        end += b"}]" if token_ids is None else self._tokens(token_ids)
        return b'%b,"choices":[{"index":%d,"delta":{%b},"logprobs":%b,"finish_reason":%b%b' % (
            self._head,
            index,
            message,
            b"null" if logprobs is None else ascii_json({"content": logprobs}),
            end,
            self._end(),
        )

    def _greeting(self, index: int) -> bytes:
        """What stands before the first text of a choice."""
        if self._tool is None:
            return b'"role":"assistant","content":'
        call = self._tool.call(self._state.request_id, index, "")
        return (
            b'"role":"assistant","content":null,"tool_calls":[{"index":0,"id":%b,'
            b'"type":"function","function":{"name":%b,"arguments":'
            % (ascii_json(call.id), ascii_json(call.function.name))
        )

    def _tokens(self, token_ids: list[int]) -> bytes:
        """The end of a choice that shows its tokens; the first event has the prompt's, too."""
        shown = b',"token_ids":%b}]' % to_json(token_ids)
        if self._prompts:
            self._prompts.clear()
            shown += b',"prompt_token_ids":%b' % to_json(self._state.prepared.prompt_of(0))
        return shown
