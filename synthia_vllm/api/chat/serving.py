"""What a chat request asks for, and what of it cannot be had."""

from __future__ import annotations

from typing import TYPE_CHECKING

from synthia_vllm.api.chat.protocol import ChatRequest
from synthia_vllm.errors import InvalidRequest
from synthia_vllm.generate import conversation
from synthia_vllm.generate.sampling import grammar_of
from synthia_vllm.template.prompt import Message

if TYPE_CHECKING:
    from synthia_vllm.admission.users import User
    from synthia_vllm.engine.base import Engine
    from synthia_vllm.generate.call import Call
    from synthia_vllm.generate.conversation import Composed
    from synthia_vllm.generate.response import Prepared
    from synthia_vllm.settings import Settings


async def prepare(call: Call) -> Prepared:
    """All that is decided before the engine sees the request, and the rules for its answers.

    Raises `InvalidRequest`, and whatever `AdmissionPermit.claim` raises.
    """
    request = call.parse(ChatRequest)
    composed = await compose(request, call.engine, call.settings, call.permit.user)
    return await conversation.prepare(call, request, composed)


async def compose(request: ChatRequest, engine: Engine, settings: Settings, user: User) -> Composed:
    """All that is decided of a request by what it says. Raises `InvalidRequest`."""
    for number, message in enumerate(request.messages):
        if message.content is None and message.role != "assistant":
            raise InvalidRequest(
                f"`messages[{number}].content` is required: a text, or a list of text parts.",
                param=f"messages[{number}].content",
                code="missing_required_parameter",
            )
    for name, to_continue in (
        ("continue_final_message", request.continue_final_message is True),
        ("add_generation_prompt", request.add_generation_prompt is False),
    ):
        if to_continue and not _continues(request):
            raise InvalidRequest(
                f"`{name}` asks for the last message to be continued, which is not the "
                "assistant's: it is answered.",
                param=name,
                code="invalid_value",
            )
    if request.top_logprobs and not request.logprobs:
        raise InvalidRequest(
            "`top_logprobs` needs `logprobs: true`.", param="top_logprobs", code="invalid_value"
        )
    return await conversation.compose(
        request,
        [Message("system" if m.role == "developer" else m.role, m.text) for m in request.messages],
        engine,
        settings,
        user,
        max_tokens=_asked_tokens(request),
        grammar=grammar_of(request),
        logprobs=(request.top_logprobs or 0) if request.logprobs else None,
    )


def _continues(request: ChatRequest) -> bool:
    """Whether the last turn is the assistant's; system messages are no turns."""
    turns = [message.role for message in request.messages if message.role in ("user", "assistant")]
    return turns[-1:] == ["assistant"]


def _asked_tokens(request: ChatRequest) -> int | None:
    old, new = request.max_tokens, request.max_completion_tokens
    if old is not None and new is not None and old != new:
        raise InvalidRequest(
            f"`max_tokens` ({old}) and `max_completion_tokens` ({new}) mean the same; send one.",
            param="max_tokens",
            code="invalid_value",
        )
    return new or old
