"""What a request for a message asks for, in the terms that all conversations have."""

from __future__ import annotations

from typing import TYPE_CHECKING

from synthia_vllm.api.messages.protocol import MessagesRequest
from synthia_vllm.errors import InvalidRequest
from synthia_vllm.generate import conversation
from synthia_vllm.generate.sampling import json_grammar
from synthia_vllm.template.prompt import Message

if TYPE_CHECKING:
    from synthia_vllm.admission.users import User
    from synthia_vllm.api.messages.protocol import CountTokensRequest, TextBlockParam
    from synthia_vllm.engine.base import Engine, Grammar
    from synthia_vllm.generate.call import Call
    from synthia_vllm.generate.conversation import Composed
    from synthia_vllm.generate.protocol import SamplingRequest
    from synthia_vllm.generate.response import Prepared
    from synthia_vllm.settings import Settings


async def prepare(call: Call) -> Prepared:
    """All that is decided before the engine sees the request, and the rule for its answer.

    Raises `InvalidRequest`, and whatever `AdmissionPermit.claim` raises.
    """
    request = call.parse(MessagesRequest)
    composed = await compose(
        request,
        request,
        call.engine,
        call.settings,
        call.permit.user,
        cache_salt=call.permit.cache_salt(request.cache_salt),
        max_tokens=request.max_tokens,
        grammar=_grammar(request),
    )
    return await conversation.prepare(call, request, composed)


async def compose(
    asked: CountTokensRequest,
    sampling: SamplingRequest,
    engine: Engine,
    settings: Settings,
    user: User,
    *,
    cache_salt: str | None,
    max_tokens: int | None = None,
    grammar: Grammar | None = None,
) -> Composed:
    """The conversation that is `asked` for, to be answered as `sampling` says.

    Raises `InvalidRequest`.
    """
    messages = [Message(message.role, _text(message.content)) for message in asked.messages]
    # Wherever it is, the prompt begins with it; here the others keep their numbers.
    if asked.system is not None:
        messages.append(Message("system", _text(asked.system)))
    try:
        return await conversation.compose(
            sampling,
            messages,
            engine,
            settings,
            user,
            cache_salt=cache_salt,
            max_tokens=max_tokens,
            grammar=grammar,
        )
    except InvalidRequest as error:
        raise error.under({f"messages[{len(asked.messages)}].content": "system"}) from None


def _text(content: str | list[TextBlockParam]) -> str:
    """The whole content; blocks are joined by newlines."""
    return content if isinstance(content, str) else "\n".join(block.text for block in content)


def _grammar(request: MessagesRequest) -> Grammar | None:
    wanted = request.output_config.format if request.output_config else None
    return json_grammar(wanted.schema_, "output_config.format.schema") if wanted else None
