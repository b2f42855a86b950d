"""The routes for text: a conversation's next answer, and raw completions."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from synthia_vllm import chat, completions
from synthia_vllm.exchange import Route
from synthia_vllm.protocol import (
    AnswerMessage,
    ChatCompletion,
    Choice,
    ChoiceLogprobs,
    parse_chat_request,
)
from synthia_vllm.raw_protocol import (
    Completion,
    CompletionChoice,
    parse_completion_request,
)
from synthia_vllm.sse import ChatEvents, TextEvents

if TYPE_CHECKING:
    from synthia_vllm import reply
    from synthia_vllm.protocol import Usage


async def _prepare_chat(
    body: bytes, *args: Any, **options: Any
) -> tuple[reply.Prepared, list[reply.Choice]]:
    return await chat.prepare(parse_chat_request(body), *args, **options)


async def _prepare_completion(
    body: bytes, *args: Any, **options: Any
) -> tuple[reply.Prepared, list[reply.Choice]]:
    return await completions.prepare(parse_completion_request(body), *args, **options)


def _chat_answer(
    answer_id: str, created: int, model: str, pieces: list[reply.Piece], usage: Usage
) -> ChatCompletion:
    choices = [
        Choice(
            index=piece.choice,
            message=AnswerMessage(content=piece.text),
            logprobs=None if piece.logprobs is None else ChoiceLogprobs(content=piece.logprobs),
            finish_reason=piece.finish_reason,
            stop_reason=piece.stop_reason,
        )
        for piece in pieces
    ]
    return ChatCompletion(id=answer_id, created=created, model=model, choices=choices, usage=usage)


def _completion_answer(
    answer_id: str, created: int, model: str, pieces: list[reply.Piece], usage: Usage
) -> Completion:
    choices = [
        CompletionChoice(
            index=piece.choice,
            text=piece.text,
            logprobs=completions.logprobs_of(piece.logprobs),
            finish_reason=piece.finish_reason,
            stop_reason=piece.stop_reason,
        )
        for piece in pieces
    ]
    return Completion(id=answer_id, created=created, model=model, choices=choices, usage=usage)


CHAT: Final = Route(
    "/v1/chat/completions", "chat", "chatcmpl", _prepare_chat, ChatEvents, _chat_answer
)
COMPLETIONS: Final = Route(
    "/v1/completions",
    "text_completion",
    "cmpl",
    _prepare_completion,
    TextEvents,
    _completion_answer,
)
ROUTES: Final = (CHAT, COMPLETIONS)
