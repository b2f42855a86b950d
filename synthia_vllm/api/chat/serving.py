"""What a chat request asks for, and what of it cannot be had."""

from __future__ import annotations

from typing import TYPE_CHECKING

from synthia_vllm.api.chat.protocol import ChatRequest
from synthia_vllm.api.chat.tools import forced_tool, refuse_choice, turns
from synthia_vllm.errors import InvalidRequest
from synthia_vllm.generate import conversation
from synthia_vllm.generate.sampling import grammar_of

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
    permit = call.permit
    cache_salt = permit.cache_salt(request.cache_salt)
    composed = await compose(request, call.engine, call.settings, permit.user, cache_salt)
    return await conversation.prepare(call, request, composed)


async def compose(
    request: ChatRequest, engine: Engine, settings: Settings, user: User, cache_salt: str | None
) -> Composed:
    """All that is decided of a request by what it says. Raises `InvalidRequest`."""
    messages = turns(request.messages)
    # System messages are no turns.
    continues = [m.role for m in messages if m.role != "system"][-1:] == ["assistant"]
    for name, to_continue in (
        ("continue_final_message", request.continue_final_message is True),
        ("add_generation_prompt", request.add_generation_prompt is False),
    ):
        if to_continue and not continues:
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
    grammar, tool = grammar_of(request), forced_tool(request)
    if tool is None:
        refuse_choice(request, settings)
    elif grammar is not None:
        raise InvalidRequest(
            f"`{grammar.param}` and `tool_choice` cannot both rule the answer; send one.",
            param=grammar.param,
            code="invalid_value",
        )
    else:
        grammar = tool.grammar
        messages.append(tool.message)
    try:
        return await conversation.compose(
            request,
            messages,
            engine,
            settings,
            user,
            cache_salt=cache_salt,
            max_tokens=_asked_tokens(request),
            grammar=grammar,
            logprobs=(request.top_logprobs or 0) if request.logprobs else None,
        )
    except InvalidRequest as error:
        if tool is not None:  # whose message is none of the request's
            error.under({f"messages[{len(request.messages)}].content": f"{tool.param}.description"})
        raise


def _asked_tokens(request: ChatRequest) -> int | None:
    old, new = request.max_tokens, request.max_completion_tokens
    if old is not None and new is not None and old != new:
        raise InvalidRequest(
            f"`max_tokens` ({old}) and `max_completion_tokens` ({new}) mean the same; send one.",
            param="max_tokens",
            code="invalid_value",
        )
    return new or old
