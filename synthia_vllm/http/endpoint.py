"""The routes for text: a conversation's next answer, and raw completions."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from synthia_vllm.api.chat import serving as chat
from synthia_vllm.api.completions import serving as completions
from synthia_vllm.api.completions.protocol import (
    Completion,
    CompletionChoice,
    parse_completion_request,
)
from synthia_vllm.generate.protocol import (
    AnswerMessage,
    ChatCompletion,
    Choice,
    ChoiceLogprobs,
    parse_chat_request,
)
from synthia_vllm.http.handler import Route
from synthia_vllm.http.sse import ChatEvents, TextEvents

if TYPE_CHECKING:
    from synthia_vllm.engine.base import Engine
    from synthia_vllm.generate import response as reply
    from synthia_vllm.generate.protocol import Usage
    from synthia_vllm.settings import Settings


async def _prepare_chat(
    body: bytes, engine: Engine, settings: Settings, *args: Any, **options: Any
) -> tuple[reply.Prepared, list[reply.Choice]]:
    request = parse_chat_request(body, refuse_unknown=settings.refuse_unknown)
    return await chat.prepare(request, engine, settings, *args, **options)


async def _prepare_completion(
    body: bytes, engine: Engine, settings: Settings, *args: Any, **options: Any
) -> tuple[reply.Prepared, list[reply.Choice]]:
    request = parse_completion_request(body, refuse_unknown=settings.refuse_unknown)
    return await completions.prepare(request, engine, settings, *args, **options)


def _chat_answer(
    answer_id: str,
    created: int,
    prepared: reply.Prepared,
    pieces: list[reply.Piece],
    usage: Usage,
) -> ChatCompletion:
    choices = [
        Choice(
            index=piece.choice,
            message=AnswerMessage(content=piece.text),
            logprobs=None if piece.logprobs is None else ChoiceLogprobs(content=piece.logprobs),
            finish_reason=piece.finish_reason,
            stop_reason=piece.stop_reason,
            token_ids=piece.token_ids,
        )
        for piece in pieces
    ]
    shown = prepared.works[0].prompt_token_ids if prepared.show_token_ids else None
    return ChatCompletion(
        id=answer_id,
        created=created,
        model=prepared.model,
        choices=choices,
        usage=usage,
        prompt_token_ids=shown,
    )


def _completion_answer(
    answer_id: str,
    created: int,
    prepared: reply.Prepared,
    pieces: list[reply.Piece],
    usage: Usage,
) -> Completion:
    choices = [
        CompletionChoice(
            index=piece.choice,
            text=piece.text,
            logprobs=completions.logprobs_of(piece.logprobs),
            finish_reason=piece.finish_reason,
            stop_reason=piece.stop_reason,
            token_ids=piece.token_ids,
            prompt_token_ids=prepared.prompt_of(piece.choice) if prepared.show_token_ids else None,
            prompt_logprobs=piece.prompt_logprobs,
        )
        for piece in pieces
    ]
    return Completion(
        id=answer_id, created=created, model=prepared.model, choices=choices, usage=usage
    )


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
